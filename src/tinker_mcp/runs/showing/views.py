"""Runs as they are shown: one summary each. Only reads; see `series` and `changes` beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from tinker_mcp.runs.showing.changes import Change, Moment, Until, Watcher, changes, moment
from tinker_mcp.runs.showing.log_tail import redacted, tail
from tinker_mcp.runs.showing.series import (
    MAX_POINTS,
    Point,
    Series,
    metric_names,
    series,
    sparkline,
)
from tinker_mcp.runs.spec import Method, RunSpec
from tinker_mcp.runs.states import ACTIVE, RunState, told
from tinker_mcp.store.rows import CheckpointRow, MetricRow, RunRow
from tinker_mcp.store.runs import RunStore

__all__ = [
    "HELD_OUT_OF",
    "LOSS_OF",
    "MAX_POINTS",
    "Change",
    "Evaluations",
    "Moment",
    "Point",
    "RunSummary",
    "Series",
    "Until",
    "Watcher",
    "changes",
    "loss_of",
    "metric_names",
    "moment",
    "redacted",
    "series",
    "sparkline",
    "summary",
    "tail",
]

LOSS_OF: Mapping[Method, str] = {
    "sft": "train_mean_nll",
    "dpo": "dpo_loss",
    "rl": "env/all/reward/total",
    "distill": "teacher_kl",
    "prompt_distill": "train_mean_nll",
}
"""What a run is told by: its loss, or where it has none that means anything, its mean reward."""

HELD_OUT_OF: Mapping[str, str] = {
    "train_mean_nll": "test/nll",
    **{loss: f"test/{loss}" for loss in ("dpo_loss", "env/all/reward/total", "teacher_kl")},
}
"""What is measured on the held-out set, by what the run is told by."""

IS_REWARD: Mapping[Method, bool] = {"rl": True}
"""Whether more of it is better."""


_PACE_STEPS = 20  # so many last steps tell how fast it goes


@dataclass(frozen=True)
class Evaluations:
    """The loss on the held-out set: at first, now, and where it was best."""

    metric: str
    first: Point
    last: Point
    best: Point | None


@dataclass(frozen=True)
class RunSummary:
    """A run.

    Attributes:
        state: As told: `crashed` where its worker gives no sign of life.
        reason: Why it is stopped.
        detail: A sentence on its state.
        loss: Of the last step; None before the first, and where it is no number.
        tokens_per_s: Of the last steps, while it is active.
        seconds_left: At the pace of the last steps, while it is active.
        tokens: Submitted so far, those of replayed steps and evaluations too.
        warnings: In the order they came, each once.
        heartbeat_age_s: Seconds since its worker's last sign of life.
    """

    run_id: str
    name: str
    method: Method
    base_model: str
    backend: str
    state: RunState
    reason: str | None
    detail: str | None
    step: int
    steps: int
    loss_metric: str
    loss: float | None
    eval: Evaluations | None
    tokens_per_s: float | None
    seconds_left: float | None
    tokens: int
    usd: float
    max_usd: float | None
    checkpoints: tuple[CheckpointRow, ...]
    warnings: tuple[str, ...]
    created_at: float
    started_at: float | None
    ended_at: float | None
    heartbeat_age_s: float

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


def loss_of(spec: RunSpec) -> str:
    """The metric that a run is told by."""
    if spec.distill is not None and spec.distill.mode == "off_policy":
        return LOSS_OF["sft"]
    return LOSS_OF[spec.method]


def summary(store: RunStore, row: RunRow, now: float | None = None) -> RunSummary:
    """One run, from what is written; a row whose state was told already keeps it."""
    now = time.time() if now is None else now
    spec = RunSpec.model_validate_json(row.spec)
    state = told(cast("RunState", row.state), now - row.heartbeat_at)
    steps = store.metrics(row.run_id, "train", after=row.step - _PACE_STEPS)
    loss_metric = loss_of(spec)
    pace = _pace(steps, row.started_at) if state in ACTIVE else None
    return RunSummary(
        run_id=row.run_id,
        name=spec.name,
        method=spec.method,
        base_model=spec.base_model,
        backend=spec.backend,
        state=state,
        reason=row.reason,
        detail=row.detail,
        step=row.step,
        steps=spec.steps,
        loss_metric=loss_metric,
        loss=_finite(steps[-1].numbers.get(loss_metric)) if steps else None,
        eval=_evaluations(store.metrics(row.run_id, "eval"), spec),
        tokens_per_s=pace.tokens_per_s if pace else None,
        seconds_left=max(0, spec.steps - row.step) * pace.step_s if pace else None,
        tokens=row.tokens,
        usd=row.usd,
        max_usd=spec.max_usd,
        checkpoints=tuple(store.checkpoints(row.run_id)),
        warnings=_warnings(store, row.run_id),
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        heartbeat_age_s=max(0.0, now - row.heartbeat_at),
    )


@dataclass(frozen=True)
class _Pace:
    step_s: float
    tokens_per_s: float | None


def _pace(steps: Sequence[MetricRow], started_at: float | None) -> _Pace | None:
    """From the times at which the newest worker recorded its last steps."""
    own = [row for row in steps if row.at >= (started_at or 0.0)]
    if len(own) < 2 or own[-1].at <= own[0].at:
        return None
    seconds = own[-1].at - own[0].at
    tokens = math.fsum(row.numbers.get("num_tokens", 0.0) for row in own[1:])
    return _Pace(seconds / (len(own) - 1), tokens / seconds if tokens else None)


def _evaluations(rows: Sequence[MetricRow], spec: RunSpec) -> Evaluations | None:
    metric = HELD_OUT_OF[loss_of(spec)]
    held_out = series(rows, metric)
    if held_out.first is None or held_out.last is None:
        return None
    best = _highest(held_out.points) if IS_REWARD.get(spec.method) else held_out.lowest
    return Evaluations(metric, held_out.first, held_out.last, best)


def _highest(points: Sequence[Point]) -> Point | None:
    known = [point for point in points if point.value is not None]
    return max(known, key=lambda point: point.value or 0.0, default=None)


def _warnings(store: RunStore, run_id: str) -> tuple[str, ...]:
    told_once = dict.fromkeys(e.what for e in store.events(run_id) if e.kind == "warning")
    return tuple(told_once)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
