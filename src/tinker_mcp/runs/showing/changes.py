"""What is new in a run since a moment, for whoever waits for it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.runs.states import ACTIVE, RunState, told
from tinker_mcp.store.rows import MetricRow, RunRow
from tinker_mcp.store.runs import RunStore

ChangeKind = Literal["eval", "state", "warning", "divergence"]


@dataclass(frozen=True)
class Moment:
    """How far somebody has seen a run."""

    state: RunState
    step: int
    event_id: int = 0
    evaluated_at: float = 0.0


@dataclass(frozen=True)
class Change:
    """Something new; `what` is a sentence or two numbers."""

    kind: ChangeKind
    step: int
    what: str


def moment(store: RunStore, row: RunRow, now: float | None = None) -> Moment:
    """All that can be seen of a run now."""
    return _look(store, row, Moment("starting", 0), now)[1]


def changes(store: RunStore, row: RunRow, since: Moment, now: float | None = None) -> list[Change]:
    """What happened since: evaluations, states, warnings, a divergence; in that order."""
    return _look(store, row, since, now)[0]


class Watcher:
    """Looks at a run again and again, and tells each thing once."""

    def __init__(self, store: RunStore, row: RunRow, since: Moment | None = None) -> None:
        self._store = store
        self.seen = since or moment(store, row)

    def look(self, row: RunRow, now: float | None = None) -> list[Change]:
        """What is new in a run since the last look."""
        news, self.seen = _look(self._store, row, self.seen, now)
        return news


def _look(
    store: RunStore, row: RunRow, since: Moment, now: float | None
) -> tuple[list[Change], Moment]:
    """What is new, and the moment up to which it was read: nothing falls between two looks."""
    state = _told(row, now)
    evaluations = [e for e in store.metrics(row.run_id, "eval") if e.at > since.evaluated_at]
    events = store.events(row.run_id, after=since.event_id)
    news = [Change("eval", e.step, _numbers(e)) for e in evaluations]
    states = [Change("state", row.step, event.what) for event in events if event.kind == "state"]
    if state != since.state and not states:  # a crash is written by nobody
        states = [Change("state", row.step, " ".join(filter(None, (state, row.detail))))]
    news += states
    news += [Change("warning", row.step, e.what) for e in events if e.kind == "warning"]
    if state != since.state and row.reason == "divergence":
        news.append(Change("divergence", row.step, row.detail or "The loss diverged."))
    return news, Moment(
        state=state,
        step=row.step,
        event_id=max((event.event_id for event in events), default=since.event_id),
        evaluated_at=max((e.at for e in evaluations), default=since.evaluated_at),
    )


@dataclass(frozen=True)
class Until:
    """What is waited for: the end, a new evaluation, or a step.

    Attributes:
        step: The step; only with `kind` "step".
    """

    kind: Literal["completed", "eval", "step"]
    step: int = 0

    @classmethod
    def parse(cls, text: str) -> Until:
        """Read `completed`, `eval` or `step=N`.

        Raises:
            InvalidInputError: It is none of these.
        """
        if text in ("completed", "eval"):
            return cls(cast("Literal['completed', 'eval']", text))
        if found := re.fullmatch(r"step\s*[=:]\s*(\d{1,9})", text):
            return cls("step", int(found[1]))
        raise InvalidInputError(
            f"Nothing can wait until {text[:80]!r}.", next_step="Use completed, eval, or step=30."
        )

    def check_reachable(self, row: RunRow) -> None:
        """Whether a run can come to what is waited for.

        Raises:
            InvalidInputError: It has not so many steps.
        """
        steps = RunSpec.model_validate_json(row.spec).steps
        if self.step > steps:
            raise InvalidInputError(
                f"{row.run_id} has {steps} steps, so it never comes to step={self.step}.",
                next_step=f"Wait until completed, or until step={steps} or an earlier one.",
            )

    def is_met(self, state: RunState, step: int, news: Sequence[Change]) -> bool:
        """Whether the wait is over; it also is where the run has ended, whatever was waited for."""
        if state not in ACTIVE:
            return True
        if self.kind == "step":
            return step >= self.step
        return self.kind == "eval" and any(change.kind == "eval" for change in news)


def _numbers(row: MetricRow) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(row.numbers.items()))


def _told(row: RunRow, now: float | None) -> RunState:
    now = time.time() if now is None else now
    return told(cast("RunState", row.state), now - row.heartbeat_at)
