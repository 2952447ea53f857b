"""The replies of the tools for runs, and how they are made of what `runs.showing` shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, Field

from tinker_mcp.runs.spec import Method, RunSpec
from tinker_mcp.runs.states import RunState
from tinker_mcp.server.tools.replies import finite

if TYPE_CHECKING:
    from tinker_mcp.runs.planning.plan import Planned
    from tinker_mcp.runs.showing.views import Change, RunSummary, Series
    from tinker_mcp.store.rows import CheckpointRow, RunRow


class StartedRun(BaseModel):
    finished: bool
    run_id: str | None = None
    is_new: bool = Field(default=True, description="False: the key had started it before.")
    state: RunState | None = None
    base_model: str | None = None
    renderer: str | None = None
    learning_rate: float | None = None
    learning_rate_source: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    datums: int | None = None
    held_out_datums: int | None = None
    held_out_source: str | None = None
    tokens: int | None = Field(default=None, description="That are billed, in all.")
    usd_low: float | None = None
    usd_high: float | None = None
    max_usd: float | None = None
    seconds: float | None = Field(default=None, description="An estimate.")
    warnings: list[str] = []
    folder: str | None = None
    next_step: str


class ListedRun(BaseModel):
    run_id: str
    name: str
    method: Method
    base_model: str
    state: RunState
    reason: str | None
    step: int
    steps: int
    loss: float | None
    is_finite: bool
    usd: float
    created_at: str


class Runs(BaseModel):
    runs: list[ListedRun] = Field(description="Newest first.")
    total: int = Field(description="Of this state.")
    next_step: str


class SavedStep(BaseModel):
    step: int
    state: str
    sampler: str
    is_final: bool


class MetricSeries(BaseModel):
    metric: str
    first: float | None
    last: float | None
    lowest: float | None
    lowest_at_step: int | None
    slope_per_100_steps: float | None = Field(description="Of the last half.")
    nan_at_step: int | None
    total: int
    steps: list[int]
    values: list[float | None]


class RunDetails(BaseModel):
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
    loss: float | None
    eval_loss: float | None
    first_eval_loss: float | None
    best_eval_loss: float | None
    best_eval_step: int | None
    nan_at_step: int | None = Field(description="The first whose loss is no finite number.")
    loss_curve: str
    eval_curve: str
    tokens_per_s: float | None
    seconds_left: float | None
    tokens: int
    usd: float
    max_usd: float | None
    created_at: str
    heartbeat_age_s: float
    checkpoints: list[SavedStep]
    checkpoint_count: int
    warnings: list[str]
    metric_names: list[str]
    series: list[MetricSeries]
    log: list[str]
    transcripts: list[dict[str, Any]] = []
    folder: str
    next_step: str


class WaitedRun(BaseModel):
    finished: bool = Field(description="What was waited for is there, or the run has ended.")
    run_id: str
    state: RunState
    reason: str | None
    detail: str | None
    step: int
    steps: int
    loss: float | None
    is_finite: bool = Field(description="False where the loss is NaN or infinite.")
    eval_loss: float | None
    seconds_left: float | None
    usd: float
    news: list[str] = Field(description="What came while this call waited.")
    next_step: str


class RunMoved(BaseModel):
    run_id: str
    state: RunState
    step: int
    steps: int
    checkpoint_step: int | None = Field(description="Of the newest one.")
    max_usd: float | None
    next_step: str


def started(run: RunSummary, spec: RunSpec, folder: Path, planned: Planned | None) -> StartedRun:
    """The reply to a start; `planned` is None where the run was there before."""
    estimate = planned.estimate if planned else None
    before = f"This idempotency_key started {run.run_id} before; nothing new was started. "
    return StartedRun(
        finished=True,
        run_id=run.run_id,
        is_new=planned is not None,
        state=run.state,
        base_model=spec.base_model,
        renderer=spec.renderer,
        learning_rate=finite(spec.learning_rate),
        learning_rate_source=spec.learning_rate_source,
        steps=spec.steps,
        batch_size=spec.batch_size,
        datums=spec.train.datums,
        held_out_datums=spec.held_out.datums if spec.held_out else 0,
        held_out_source=spec.held_out.source if spec.held_out else None,
        tokens=estimate.tokens.get("total") if estimate else None,
        usd_low=short(estimate.usd_low) if estimate else None,
        usd_high=short(estimate.usd_high) if estimate else None,
        max_usd=spec.max_usd,
        seconds=short(estimate.seconds) if estimate else None,
        warnings=list(planned.warnings) if planned else list(run.warnings),
        folder=str(folder),
        next_step=("" if planned else before) + next_step(run),
    )


def waited(run: RunSummary, news: Sequence[Change], is_finished: bool) -> WaitedRun:
    return WaitedRun(
        finished=is_finished,
        run_id=run.run_id,
        state=run.state,
        reason=run.reason,
        detail=run.detail,
        step=run.step,
        steps=run.steps,
        loss=short(run.loss),
        is_finite=run.loss is not None or run.step == 0,
        eval_loss=short(run.eval.last.value) if run.eval else None,
        seconds_left=short(run.seconds_left),
        usd=round(run.usd, 4),
        news=[f"{change.kind} at step {change.step}: {change.what}" for change in news],
        next_step=next_step(run),
    )


def moved(run: RunSummary) -> RunMoved:
    return RunMoved(
        run_id=run.run_id,
        state=run.state,
        step=run.step,
        steps=run.steps,
        checkpoint_step=run.checkpoints[-1].step if run.checkpoints else None,
        max_usd=run.max_usd,
        next_step=next_step(run),
    )


def listed(row: RunRow, spec: RunSpec, loss: float | None) -> ListedRun:
    """A line of list_runs; `row` has the state to be told."""
    return ListedRun(
        run_id=row.run_id,
        name=spec.name,
        method=spec.method,
        base_model=spec.base_model,
        state=cast("RunState", row.state),
        reason=row.reason,
        step=row.step,
        steps=spec.steps,
        loss=short(loss),
        is_finite=loss is None or math.isfinite(loss),
        usd=round(row.usd, 4),
        created_at=time_of(row.created_at),
    )


def saved(row: CheckpointRow) -> SavedStep:
    return SavedStep(
        step=row.step, state=row.state_path, sampler=row.sampler_path, is_final=row.is_final
    )


def metric_series(cut: Series) -> MetricSeries:
    return MetricSeries(
        metric=cut.metric,
        first=short(cut.first.value) if cut.first else None,
        last=short(cut.last.value) if cut.last else None,
        lowest=short(cut.lowest.value) if cut.lowest else None,
        lowest_at_step=cut.lowest.step if cut.lowest else None,
        slope_per_100_steps=short(cut.slope_per_100_steps),
        nan_at_step=cut.nan_at_step,
        total=cut.total,
        steps=[point.step for point in cut.points],
        values=[short(point.value) for point in cut.points],
    )


_GO_ON = 'Call resume_run(run_id="{run_id}").'
_SAMPLE = 'Call sample(run_id="{run_id}", messages=...)'
_NEXT = {
    "starting": 'Call wait_for_run(run_id="{run_id}").',
    "running": 'Call wait_for_run(run_id="{run_id}").',
    "waiting": 'It goes on by itself. Call wait_for_run(run_id="{run_id}").',
    "completed": _SAMPLE + ' and get_run(run_id="{run_id}", plot=true).',
    "failed": 'Mend what detail says, then call resume_run(run_id="{run_id}").',
    "crashed": "Its worker died; nothing before the last checkpoint is lost. " + _GO_ON,
    "user": _GO_ON,
    "budget": 'Call resume_run(run_id="{run_id}", max_usd=...) with more, or sample(run_id=...).',
    "divergence": 'Call get_run(run_id="{run_id}", log_lines=20), then start_run with a tenth of '
    "the rate; the last good checkpoint stays.",
}


def next_step(run: RunSummary) -> str:
    """The call to make after anything that was told of a run."""
    key = run.reason or "user" if run.state == "stopped" else run.state
    return _NEXT[key].format(run_id=run.run_id)


def short(value: float | None) -> float | None:
    """Rounded to six digits."""
    return None if value is None else finite(value)


def time_of(at: float) -> str:
    """Seconds since 1970 as ISO 8601."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
