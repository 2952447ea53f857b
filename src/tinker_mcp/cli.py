"""`tinker-mcp`: argv to one call."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

import click
import structlog

from tinker_mcp import __version__
from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.settings import Settings

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
    # stdout belongs to the protocol.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    structlog.configure(
        # Not structlog's own choice, which prints local variables, the environment among them.
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


_backend = click.option(
    "--backend",
    type=click.Choice(["auto", "hosted", "local"]),
    default=None,
    help="auto (the default): hosted if TINKER_API_KEY or TINKER_BASE_URL is set, else local.",
)


@main.command()
@_backend
def serve(backend: BackendChoice | None) -> None:
    """Speak MCP over stdio; this is what a host starts."""
    import anyio

    from tinker_mcp.server import create_server

    settings = Settings.from_environment(os.environ, backend=backend)
    anyio.run(create_server(settings).run_stdio_async)


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
