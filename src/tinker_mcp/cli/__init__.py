"""`tinker-mcp`: argv to one call."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

import click
import structlog
from click.core import ParameterSource

from tinker_mcp import __version__, garbage
from tinker_mcp.cli.runs import COMMANDS
from tinker_mcp.errors import InvalidInputError, TinkerMcpError
from tinker_mcp.settings import LogSettings, Settings

if TYPE_CHECKING:
    from tinker_mcp.settings import BackendChoice


class _Commands(click.Group):
    """Prints a TinkerMcpError as a sentence instead of a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TinkerMcpError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tinker-mcp")
def main() -> None:
    """Fine-tuning for coding agents: an MCP server on Tinker, with a local backend built in."""
    _log_to_stderr(LogSettings.from_environment(os.environ))


def _log_to_stderr(log: LogSettings) -> None:
    """Send structlog's lines and the libraries' to stderr; stdout belongs to the protocol."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    # Plain tracebacks: structlog's own choice prints local variables, the environment among them.
    rendering: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if log.format == "json"
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    level = logging.getLevelNamesMapping()[log.level.upper()]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    # The libraries tell much at info.
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING))


_backend = click.option(
    "--backend",
    type=click.Choice(["auto", "hosted", "local"]),
    default=None,
    help="auto (the default): hosted if TINKER_API_KEY or TINKER_BASE_URL is set, else local.",
)


@main.command()
@_backend
@click.option(
    "--root",
    "roots",
    multiple=True,
    metavar="DIR",
    help="A folder whose files an agent may name; may be repeated. Default: TINKER_MCP_ROOTS, "
    "else the working directory.",
)
@click.option(
    "--toolsets",
    default=None,
    metavar="NAMES",
    help="Groups of tools to offer, separated by commas: setup, data, training, sampling, "
    "checkpoints, runs. Default: TINKER_MCP_TOOLSETS, else all.",
)
@click.option("--read-only", is_flag=True, help="Leave out all tools that change or spend.")
@click.option("--http", "is_http", is_flag=True, help="Speak streamable HTTP instead of stdio.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="With --http: the address; another than loopback only with TINKER_MCP_TOKEN.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="With --http; 0 finds a free one.",
)
@click.option(
    "--allowed-host",
    "names",
    multiple=True,
    metavar="NAME",
    help="With --http: a name, without port, that requests may use for this machine besides the "
    "address and loopback; may be repeated.",
)
def serve(
    backend: BackendChoice | None,
    roots: tuple[str, ...],
    toolsets: str | None,
    read_only: bool,
    is_http: bool,
    host: str,
    port: int,
    names: tuple[str, ...],
) -> None:
    """Speak MCP over stdio; this is what a host starts. With --http, over HTTP at /mcp.

    It ends with its input or its parent, and at SIGINT and SIGTERM; so does the local backend that
    nobody else uses.

    Over HTTP, requests must carry the token in TINKER_MCP_TOKEN as `Authorization: Bearer`. Where
    it is not set, one is made: the JSON line on stdout that says the url holds it, once.
    """
    parent = os.getppid()
    if not is_http:
        _refuse_address()
    settings = Settings.from_environment(
        os.environ, backend=backend, roots=roots, toolsets=toolsets, read_only=read_only
    )
    with garbage.while_importing():
        import anyio

        from tinker_mcp.server import create_server

        server = create_server(settings)
    if is_http:
        from tinker_mcp.server.http import Address, serve_http

        anyio.run(serve_http, server, Address(host, port, names), settings.http_token)
    else:
        from tinker_mcp.server.lifecycle import serve_stdio

        anyio.run(serve_stdio, server, parent)


def _refuse_address() -> None:
    """Refuse options that would do nothing over stdio.

    Raises:
        InvalidInputError: One was given.
    """
    context = click.get_current_context()
    for name, option in (("host", "--host"), ("port", "--port"), ("names", "--allowed-host")):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise InvalidInputError(
                f"{option} does nothing over stdio.",
                next_step=f"Add --http to serve over HTTP, or leave {option} out.",
            )


@main.command()
@click.option(
    "--backend",
    type=click.Choice(["auto", "hosted", "local"]),
    default="local",
    show_default=True,
    help="hosted trains on the hosted service, which costs money; name a --base-model there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Optimizer steps.",
)
@click.option("--base-model", default=None, help="Default: the first that the backend lists.")
def demo(backend: BackendChoice, as_json: bool, steps: int, base_model: str | None) -> None:
    """Do what an agent would: fine-tune a model through the MCP tools, and show the difference."""
    from tinker_mcp.demo import run_demo

    sys.exit(run_demo(backend, as_json=as_json, steps=steps, base_model=base_model))


for _command in COMMANDS:
    main.add_command(_command)
