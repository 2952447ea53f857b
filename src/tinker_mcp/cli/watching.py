"""`tinker-mcp watch`: runs on a terminal while they go, or as lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tinker_mcp.cli import lines
from tinker_mcp.runs.showing.views import (
    HELD_OUT_OF,
    MAX_POINTS,
    RunSummary,
    Watcher,
    series,
    sparkline,
    summary,
)
from tinker_mcp.runs.states import ACTIVE
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.store.rows import MetricRow, RunRow
from tinker_mcp.store.runs import RunStore, exists

POLL_S = 0.5
STEP_LINE_S = 5.0
_SHOWN = 10
_MAX_SPARK_CHARACTERS = 60

_COLOURS = {"running": "green", "waiting": "yellow", "crashed": "red", "failed": "red"}


def watch(home: Path, supervisor: Supervisor, run_id: str | None) -> None:
    """Show a run, or all, until it or they have ended."""
    console = Console()
    if not exists(home):
        console.print("No runs yet; an agent starts one with start_run.")
        return
    with RunStore(home) as store:
        if console.is_terminal:
            _watch_live(console, store, supervisor, run_id)
        else:
            for line in _lines(store, supervisor, run_id):
                console.out(line, highlight=False)


def _watch_live(
    console: Console, store: RunStore, supervisor: Supervisor, run_id: str | None
) -> None:
    with Live(console=console, auto_refresh=False) as live:
        for rows in _looks(supervisor, run_id):
            live.update(picture(store, rows, run_id, console.width), refresh=True)


def picture(
    store: RunStore, rows: Sequence[RunRow], run_id: str | None, width: int
) -> RenderableType:
    """One run with its curve, or a table of all."""
    if run_id is None:
        return _table([summary(store, row) for row in rows[:_SHOWN]])
    return _one(store, summary(store, rows[0]), width)


def _lines(store: RunStore, supervisor: Supervisor, run_id: str | None) -> Iterator[str]:
    """A line a run, then one for each thing that happens, and for its steps every few seconds."""
    told: dict[str, _Told] = {}
    for rows in _looks(supervisor, run_id):
        for row in rows:
            known = told.setdefault(row.run_id, _Told(Watcher(store, row)))
            of = f"{row.run_id} " if run_id is None else ""
            news = known.watcher.look(row)
            yield from (of + lines.change_line(change) for change in news)
            if known.is_due(row, has_changed=any(change.kind == "state" for change in news)):
                yield lines.run_line(summary(store, row))


@dataclass
class _Told:
    """What was printed of a run."""

    watcher: Watcher
    step: int = -1
    at: float = 0.0

    def is_due(self, row: RunRow, *, has_changed: bool) -> bool:
        """Whether its line is due: at first, at the end, and for new steps after a while."""
        has_ended = has_changed and row.state not in ACTIVE
        if not has_ended and (
            self.step == row.step or (self.at and time.monotonic() - self.at < STEP_LINE_S)
        ):
            return False
        self.step, self.at = row.step, time.monotonic()
        return True


def _chosen(supervisor: Supervisor, run_id: str | None) -> list[RunRow]:
    return supervisor.runs()[:_SHOWN] if run_id is None else [supervisor.run(run_id)]


def _looks(supervisor: Supervisor, run_id: str | None) -> Iterator[list[RunRow]]:
    """The runs as they are now, until none of them is active; at least once."""
    while True:
        rows = _chosen(supervisor, run_id)
        yield rows
        if all(row.state not in ACTIVE for row in rows):
            return
        time.sleep(POLL_S)


def _table(summaries: Sequence[RunSummary]) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for title in lines.HEAD:
        table.add_column(title, no_wrap=True)
    for of in summaries:
        table.add_row(*lines.cells(of, time.time()), style=_COLOURS.get(of.state, "dim"))
    return table


def _one(store: RunStore, of: RunSummary, width: int) -> RenderableType:
    colour = _COLOURS.get(of.state, "bold")
    cells = min(_MAX_SPARK_CHARACTERS, max(8, width - 30))
    held_out_loss = HELD_OUT_OF[of.loss_metric]
    curves = [
        _curve(store.metrics(of.run_id, "train"), of.loss_metric, cells),
        _curve(store.metrics(of.run_id, "eval"), held_out_loss, cells),
    ]
    facts = (
        f"{lines.number(of.tokens_per_s)} tokens/s" if of.tokens_per_s else "",
        f"{lines.duration(of.seconds_left)} left" if of.seconds_left is not None else "",
        f"cost {lines.cost(of)}" if of.usd else "",
        f"last checkpoint: step {of.checkpoints[-1].step}" if of.checkpoints else "",
    )
    warnings = [Text(lines.one_line(warning), "yellow") for warning in of.warnings[-2:]]
    return Group(
        Text.assemble((of.run_id, "bold"), f" {of.name}  {of.method} on {of.base_model}"),
        Text(lines.state(of), colour) + Text(f"  step {of.step}/{of.steps}"),
        _bar(of.step / of.steps, min(width, _MAX_SPARK_CHARACTERS), colour),
        *(curve for curve in curves if curve is not None),
        Text(", ".join(fact for fact in facts if fact)),
        *([Text(lines.one_line(of.detail))] if of.detail else []),
        *warnings,
    )


def _bar(share: float, cells: int, colour: str) -> Text:
    done = round(min(1.0, share) * cells)
    return Text.assemble(("━" * done, colour), ("─" * (cells - done), "dim"))


def _curve(rows: Sequence[MetricRow], metric: str, cells: int) -> Text | None:
    of = series(rows, metric, MAX_POINTS)
    if not of.points:
        return None
    values = [point.value for point in of.points]
    last = lines.number(values[-1]) if values[-1] is not None else "no number"
    return Text.assemble(
        f"{metric:>15} ", (sparkline(values, cells), "cyan"), f" {last}", overflow="ellipsis"
    )
