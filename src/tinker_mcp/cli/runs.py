"""The commands for runs: what list_runs, wait_for_run, stop_run and resume_run do, in a terminal.

They read the store; only `stop` and `resume` change something, through the supervisor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.settings import Settings

if TYPE_CHECKING:
    from tinker_mcp.runs.folder import RunFolder
    from tinker_mcp.runs.showing.views import RunSummary
    from tinker_mcp.runs.supervisor import Supervisor
    from tinker_mcp.store.rows import RunRow

POLL_S = 0.25
ENDED_OTHERWISE, STILL_RUNNING, INTERRUPTED = 1, 3, 130
_LISTED = 10
_LOG_LINES = 20
_MAX_LOG_LINES = 5000

_run = click.argument("run", required=False)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_WHICH = (
    "RUN is an id, the beginning of one, or a name; it may be left out where one run is active."
)


@click.command()
@_as_json
@click.option("--all", "is_all", is_flag=True, help=f"Not only the newest {_LISTED}.")
def runs(as_json: bool, is_all: bool) -> None:
    """List training runs, the newest first."""
    from tinker_mcp.cli.lines import table

    rows = _supervisor().runs()
    shown = rows if is_all else rows[:_LISTED]
    summaries = [_summary(row) for row in shown]
    if as_json:
        _print_json([dataclasses.asdict(summary) for summary in summaries])
    elif not rows:
        click.echo("No runs yet; an agent starts one with start_run.")
    else:
        click.echo(table(summaries, time.time()))
        if left_out := len(rows) - len(shown):
            click.echo(f"{left_out} more: tinker-mcp runs --all")


@click.command(
    help=f"""Wait for a run, and say what happens meanwhile.

    {_WHICH}

    Exits with 0 when the run is completed, or what --until names has happened; with 1 when it ended
    in another way: failed, crashed or stopped; with 3 when it still runs after --timeout-s.
    """
)
@_run
@click.option(
    "--timeout-s", type=click.FloatRange(min=0), default=None, help="Default: as long as it takes."
)
@click.option(
    "--until",
    "until_text",
    default="completed",
    show_default=True,
    metavar="completed|eval|step=N",
    help="Wait for its end, the next evaluation, or a step.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def wait(run: str | None, timeout_s: float | None, until_text: str, as_json: bool) -> None:
    from tinker_mcp.cli.lines import change_line, run_line
    from tinker_mcp.runs.showing.views import Until, Watcher
    from tinker_mcp.store.runs import RunStore

    until = Until.parse(until_text)
    row = _found(run)
    until.check_reachable(row)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with RunStore(_settings().home) as store, _ended_by_ctrl_c(INTERRUPTED):
        watcher, has_met = Watcher(store, row), False
        for now in _looks(row.run_id, deadline):
            news = watcher.look(now)
            for change in () if as_json else news:
                click.echo(change_line(change))
            has_met = until.is_met(watcher.seen.state, watcher.seen.step, news)
            if has_met:
                break
    summary = _summary(now)
    if as_json:
        _print_json(dataclasses.asdict(summary))
    else:
        click.echo(run_line(summary))
    sys.exit(_exit_code(summary, has_met))


def _exit_code(summary: RunSummary, has_met: bool) -> int:
    if summary.is_active:
        return 0 if has_met else STILL_RUNNING
    return 0 if summary.state == "completed" else ENDED_OTHERWISE


@click.command(help=f"Show the end of a run's log.\n\n{_WHICH}")
@_run
@click.option("-f", "--follow", "is_followed", is_flag=True, help="Go on until the run ends.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(0, _MAX_LOG_LINES),
    default=_LOG_LINES,
    show_default=True,
    help="So many lines.",
)
def logs(run: str | None, is_followed: bool, lines: int) -> None:
    from tinker_mcp.runs.folder import RunFolder
    from tinker_mcp.runs.redaction import secrets_in
    from tinker_mcp.runs.showing.views import redacted, tail

    row = _found(run)
    folder = RunFolder.of(_settings().home, row.run_id)
    secrets = secrets_in(os.environ)
    start = folder.log.stat().st_size if folder.log.exists() else 0
    for line in tail(folder.log, lines, secrets):
        click.echo(line)
    if is_followed:
        with _ended_by_ctrl_c(0):
            for line in _new_lines(folder, row.run_id, start):
                click.echo(redacted(line, secrets))


def _new_lines(folder: RunFolder, run_id: str, start: int) -> Iterator[str]:
    """What is added to a log from a byte on, until its run has ended."""
    rest = b""
    for row in _looks(run_id, None):
        if folder.log.exists():
            with folder.log.open("rb") as file:
                file.seek(start)
                added = file.read()
            start += len(added)
            *whole, rest = (rest + added).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if not _is_active(row):
            break
    if rest:
        yield rest.decode(errors="replace")


@click.command(
    help=f"""Have a run stop after the step it is at, with a checkpoint to go on from.

    {_WHICH}
    """
)
@_run
@click.option("--no-save", is_flag=True, help="Without a new checkpoint; earlier ones stay.")
@_as_json
def stop(run: str | None, no_save: bool, as_json: bool) -> None:
    row = _found(run)
    was_active = _is_active(row)
    row = _supervisor().stop(row.run_id, save=not no_save)
    if as_json:
        _print_json(dataclasses.asdict(_summary(row)))
    elif not was_active:
        click.echo(f"{row.run_id} has ended: {row.state}, at step {row.step}.")
    else:
        how = "without a new checkpoint" if no_save else "and saves a checkpoint first"
        click.echo(
            f"{row.run_id} stops after its current step, {how}."
            f" To see it through: tinker-mcp wait {row.run_id}"
        )


@click.command()
@click.argument("run")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Of the whole run.")
@click.option("--max-usd", type=float, default=None, help="What the whole run may cost.")
@click.option(
    "--accept-divergence", is_flag=True, help="Go on whatever the loss does from here on."
)
@_as_json
def resume(
    run: str,
    steps: int | None,
    max_usd: float | None,
    accept_divergence: bool,
    as_json: bool,
) -> None:
    """Start a run again from its last checkpoint, where it was stopped or its worker died.

    RUN is an id, the beginning of one, or a name. It goes on where it began, on the local backend
    or the hosted service.
    """
    from tinker_mcp.runs.spec import RunSpec
    from tinker_mcp.runs.supervisor import Supervisor

    found = _found(run)
    settings = Settings.from_environment(
        os.environ, backend=RunSpec.model_validate_json(found.spec).backend
    )
    if not settings.is_local and not settings.has_api_key:
        raise InvalidInputError(
            f"{found.run_id} runs on the hosted service, which needs a key.",
            next_step="Set TINKER_API_KEY.",
        )
    row = Supervisor(settings).resume(
        found.run_id, steps=steps, max_usd=max_usd, accept_divergence=accept_divergence
    )
    if as_json:
        _print_json(dataclasses.asdict(_summary(row)))
    else:
        click.echo(
            f"{row.run_id} goes on after step {row.step}."
            f" To see it through: tinker-mcp wait {row.run_id}"
        )


@click.command(
    help=f"""Watch runs live: all of them, or one with its curve.

    {_WHICH} Without RUN, where none or several are active, all are shown.

    It ends with the run, or with Ctrl-C, which leaves the run alone. Where the output is no
    terminal, it prints a line for each thing that happens.
    """
)
@_run
def watch(run: str | None) -> None:
    from tinker_mcp.cli import watching

    settings = _settings()
    supervisor = _supervisor()
    active = [row for row in supervisor.runs() if _is_active(row)]
    row = _found(run) if run is not None or len(active) == 1 else None
    with _ended_by_ctrl_c(0):
        watching.watch(settings.home, supervisor, row.run_id if row else None)


COMMANDS = (runs, wait, logs, stop, resume, watch)


@contextlib.contextmanager
def _ended_by_ctrl_c(status: int) -> Iterator[None]:
    """Ctrl-C ends this process with a status, without a word."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(status)


def _settings() -> Settings:
    return Settings.from_environment(os.environ)


def _supervisor() -> Supervisor:
    from tinker_mcp.runs.supervisor import Supervisor

    return Supervisor(_settings())


def _summary(row: RunRow) -> RunSummary:
    from tinker_mcp.runs.showing.views import summary
    from tinker_mcp.store.runs import RunStore

    with RunStore(_settings().home) as store:
        return summary(store, row)


def _looks(run_id: str, deadline: float | None) -> Iterator[RunRow]:
    """The run as it is now, again and again, until a deadline; at least once."""
    supervisor = _supervisor()
    while True:
        yield supervisor.run(run_id)
        left_s = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
        if left_s <= 0:
            return
        time.sleep(left_s)


def _is_active(row: RunRow) -> bool:
    from tinker_mcp.runs.states import ACTIVE

    return row.state in ACTIVE


def _found(text: str | None) -> RunRow:
    """The one run that is meant by an id, the beginning of one, a name, or nothing.

    Raises:
        NotFoundError: There is none.
        InvalidInputError: There are several.
    """
    from tinker_mcp.runs.which import fitting, ids, only

    rows = _supervisor().runs()
    of_text = [row for row in rows if _is_active(row)] if text is None else fitting(rows, text)
    found = only(of_text)
    if found is None:
        what = "active run" if text is None else f"run {text!r}"
        known = f"the newest: {ids(rows)}" if rows else "there are no runs yet"
        raise NotFoundError(f"No {what}; {known}.", next_step="See tinker-mcp runs --all.")
    return found


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))
