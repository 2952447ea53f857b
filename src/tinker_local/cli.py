"""`tinker-local`: serve Tinker's protocol on this machine."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Literal, cast

import click
import httpx
import structlog

from tinker_local import __version__, running
from tinker_local.errors import LocalError
from tinker_local.weights import DEFAULT_MODEL, TINY_MODEL, TINY_VL_MODEL

DEFAULT_MODELS = (DEFAULT_MODEL, TINY_MODEL, TINY_VL_MODEL)


class _Commands(click.Group):
    """Prints a LocalError as a sentence instead of a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LocalError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tinker-local")
def main() -> None:
    """A Tinker-compatible training server on this machine: real LoRA training, no key, no cloud."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


_state_dir = click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=running.default_state_dir,
    show_default="the platform's state directory",
    help="Where training runs and checkpoints lie.",
)


@main.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME|DIR",
    envvar="TINKER_LOCAL_MODELS",
    help="A model to serve, again for more: a name on the hub, a Hugging Face folder, or "
    f"NAME=DIR.  [default: {', '.join(DEFAULT_MODELS)}]",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME=MODEL",
    envvar="TINKER_LOCAL_ALIASES",
    help="Answer to NAME, again for more, with the served MODEL: for programs that know only "
    "certain names. Its results are MODEL's.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="A loopback address.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="0 finds a free one.",
)
@_state_dir
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    envvar="TINKER_LOCAL_DTYPE",
    default="auto",
    show_default=True,
    help="Number format of the base weights; auto is bfloat16 where the hardware has it.",
)
@click.option(
    "--idle-exit-s",
    type=click.FloatRange(min=0),
    default=0,
    help="End after so many seconds without a client; 0 never.",
)
@click.option(
    "--exit-with-stdin",
    is_flag=True,
    help="End when standard input has ended: when all who hold the other end of it are gone.",
)
@click.option(
    "--cycle-s",
    type=click.FloatRange(min=0, min_open=True),
    help="Simulate the hosted service's clock: pick training work up every so many seconds, one "
    "step of each training client at a time. `tinker-local stats` counts the cycles.",
)
def serve(
    models: tuple[str, ...],
    aliases: tuple[str, ...],
    host: str,
    port: int,
    state_dir: Path,
    dtype: str,
    idle_exit_s: float,
    exit_with_stdin: bool,
    cycle_s: float | None,
) -> None:
    """Serve until interrupted; prints one JSON line when ready.

    The line holds base_url, api_key, pid, models and env, the variables that any program on the
    tinker SDK needs to use this server.
    """
    # Before tokenizers is imported, which reads it once and else warns at each fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Before torch is imported: its threads wait for each other at most half a millisecond before
    # they yield the core. GNU's default is 30 times that, so that beside other busy programs a step
    # took minutes instead of a second; on an idle machine one row is sampled 8 % slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from tinker_local.server import ServeOptions, serve

    serve(
        ServeOptions(
            models or DEFAULT_MODELS,
            host,
            port,
            state_dir.expanduser().resolve(),
            cast("Literal['auto', 'float32', 'bfloat16']", dtype),
            idle_exit_s,
            aliases,
            cycle_s,
            exit_with_stdin,
        )
    )


@main.command()
@_state_dir
def env(state_dir: Path) -> None:
    """Print export lines for the running server: eval "$(tinker-local env)"."""
    server = running.find(state_dir.expanduser().resolve())
    for name, value in server.env.items():
        click.echo(f"export {name}={shlex.quote(value)}")


@main.command()
@_state_dir
def stats(state_dir: Path) -> None:
    """Print what the running server is doing, as JSON: queues, tokens, cycles used and wasted."""
    server = running.find(state_dir.expanduser().resolve())
    headers = {"X-API-Key": server.api_key}
    # Loopback: a proxy from the environment could not reach it.
    answer = httpx.get(f"{server.base_url}/stats", headers=headers, trust_env=False, timeout=30)
    click.echo(json.dumps(answer.raise_for_status().json(), indent=2))
