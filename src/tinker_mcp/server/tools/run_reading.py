"""What is known of runs, read for the tools and resources.

Needs no backend, makes no file and imports nothing heavy. All of it blocks: call it in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.runs.states import RunState
from tinker_mcp.server.tools import run_replies
from tinker_mcp.server.tools.run_replies import (
    ListedRun,
    RunDetails,
    Runs,
    metric_series,
    next_step,
    saved,
    short,
    time_of,
)
from tinker_mcp.settings import Settings

if TYPE_CHECKING:
    from tinker_mcp.runs.showing.views import Change, Moment, RunSummary
    from tinker_mcp.runs.supervisor import Supervisor
    from tinker_mcp.store.rows import RunRow
    from tinker_mcp.store.runs import RunStore

_WARNINGS_SHOWN, _CHECKPOINTS_SHOWN = 10, 5
_LINE_CHARACTERS = 300  # of a line of the log


@dataclass(frozen=True)
class RunWeights:
    """A run's newest sampler weights; `told` is a phrase that says whose they are."""

    sampler_path: str
    told: str


def id_of(settings: Settings, text: str) -> str:
    """The id of the run that is meant: by id, by a name that no other has, by an id's beginning.

    Raises:
        NotFoundError: None is.
        InvalidInputError: Several are.
    """
    return supervisor(settings).find(text).run_id


def newest_weights(settings: Settings, text: str) -> RunWeights:
    """The newest weights that can be sampled, of the run that is meant.

    Raises:
        NotFoundError: There is no such run, or it has saved none yet.
        InvalidInputError: Several are meant.
    """
    run_id = id_of(settings, text)
    run = summary(settings, run_id)
    if not run.checkpoints:
        raise NotFoundError(
            f"{run_id} ({run.state}, step {run.step} of {run.steps}) has no checkpoint yet.",
            next_step=next_step(run),
        )
    newest = run.checkpoints[-1]
    going = f"; the run is {run.state} at step {run.step} of {run.steps}"
    return RunWeights(newest.sampler_path, f"{run_id} at step {newest.step}{going}")


def listed(settings: Settings, state: RunState | None = None, limit: int = 20) -> Runs:
    """The newest runs, and how many there are."""
    rows = [row for row in supervisor(settings).runs() if state is None or row.state == state]
    if not rows:
        return Runs(runs=[], total=0, next_step="Call start_run to start one.")
    with _store(settings) as store:
        shown = [_listed(store, row) for row in rows[:limit]]
    call = f'Call get_run(run_id="{rows[0].run_id}").'
    return Runs(runs=shown, total=len(rows), next_step=call)


def _listed(store: RunStore, row: RunRow) -> ListedRun:
    spec = RunSpec.model_validate_json(row.spec)
    return run_replies.listed(row, spec, _last_loss(store, row, spec))


def _last_loss(store: RunStore, row: RunRow, spec: RunSpec) -> float | None:
    from tinker_mcp.runs.showing.views import loss_of

    last = store.metrics(row.run_id, "train", after=row.step - 1)
    return last[-1].numbers.get(loss_of(spec)) if last else None


def details(
    settings: Settings,
    run_id: str,
    metrics: Sequence[str] = (),
    points: int = 20,
    log_lines: int = 0,
    transcripts: int = 0,
) -> RunDetails:
    """All there is to show of a run.

    Raises:
        NotFoundError: There is none of this id.
        InvalidInputError: It has no such metric.
    """
    from tinker_mcp.runs.folder import RunFolder
    from tinker_mcp.runs.showing.views import HELD_OUT_OF, metric_names, series, sparkline, tail
    from tinker_mcp.runs.transcripts import last as last_transcripts
    from tinker_mcp.runs.transcripts import path_in

    run = summary(settings, run_id)
    with _store(settings) as store:
        train, held_out = store.metrics(run_id, "train"), store.metrics(run_id, "eval")
    eval_metric = HELD_OUT_OF[run.loss_metric]
    names = dict.fromkeys(metric_names(train), train)
    names = dict.fromkeys(metric_names(held_out), held_out) | names
    wanted = metrics or [name for name in (run.loss_metric, eval_metric) if name in names]
    _check_metrics(run_id, wanted, sorted(names))
    losses, evals = series(train, run.loss_metric), series(held_out, eval_metric)
    folder = RunFolder.of(settings.home, run_id)
    last = run.eval
    return RunDetails(
        run_id=run_id,
        name=run.name,
        method=run.method,
        base_model=run.base_model,
        backend=run.backend,
        state=run.state,
        reason=run.reason,
        detail=run.detail,
        step=run.step,
        steps=run.steps,
        loss=short(run.loss),
        eval_loss=short(last.last.value) if last else None,
        first_eval_loss=short(last.first.value) if last else None,
        best_eval_loss=short(last.best.value) if last and last.best else None,
        best_eval_step=last.best.step if last and last.best else None,
        nan_at_step=losses.nan_at_step,
        loss_curve=sparkline([point.value for point in losses.points]),
        eval_curve=sparkline([point.value for point in evals.points]),
        tokens_per_s=short(run.tokens_per_s),
        seconds_left=short(run.seconds_left),
        tokens=run.tokens,
        usd=round(run.usd, 4),
        max_usd=run.max_usd,
        created_at=time_of(run.created_at),
        heartbeat_age_s=round(run.heartbeat_age_s, 1),
        checkpoints=[saved(row) for row in run.checkpoints[-_CHECKPOINTS_SHOWN:]],
        checkpoint_count=len(run.checkpoints),
        warnings=list(run.warnings[-_WARNINGS_SHOWN:]),
        metric_names=sorted(names),
        series=[metric_series(series(names[name], name, points)) for name in wanted],
        log=[line[:_LINE_CHARACTERS] for line in tail(folder.log, log_lines, _secrets(settings))],
        transcripts=last_transcripts(path_in(folder.path), transcripts),
        folder=str(folder.path),
        next_step=next_step(run),
    )


@dataclass(frozen=True)
class Look:
    """A run as a waiting call sees it; `news` is what came since it began to wait."""

    row: RunRow
    state: RunState
    steps: int
    loss: float | None
    began: Moment
    news: Sequence[Change]

    @property
    def progress(self) -> str:
        loss = "" if self.loss is None else f": loss {self.loss:.4f}"
        return f"step {self.row.step} of {self.steps}{loss}"


def look(settings: Settings, run_id: str, since: Moment | None) -> Look:
    """A quick look at a run: a few rows, however long it is."""
    from tinker_mcp.runs.showing.views import changes, moment

    row = supervisor(settings).run(run_id)
    spec = RunSpec.model_validate_json(row.spec)
    with _store(settings) as store:
        began = since or moment(store, row)
        news = changes(store, row, began) if since else []
        loss = _last_loss(store, row, spec)
    return Look(row, cast("RunState", row.state), spec.steps, loss, began, news)


def _check_metrics(run_id: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InvalidInputError(
            f"{run_id} has no metric {', '.join(unknown)}.",
            next_step=f"Give some of: {', '.join(known) or 'none is measured yet'}.",
        )


def plotted(settings: Settings, run_id: str) -> bytes:
    """The loss curves of a run as a PNG."""
    from tinker_mcp.runs.showing.plot import curves_png
    from tinker_mcp.runs.showing.views import HELD_OUT_OF

    run = summary(settings, run_id)
    curves = {}
    with _store(settings) as store:
        for kind, metric in (("train", run.loss_metric), ("eval", HELD_OUT_OF[run.loss_metric])):
            rows = store.metrics(run_id, "train" if kind == "train" else "eval")
            curves[metric] = [(r.step, r.numbers[metric]) for r in rows if metric in r.numbers]
    title = f"{run.name} ({run_id}), {run.method} of {run.base_model}: {run.state}"
    return curves_png({name: curve for name, curve in curves.items() if curve}, title)


def supervisor(settings: Settings) -> Supervisor:
    """Who starts and stops the runs of this home."""
    from tinker_mcp.runs.supervisor import Supervisor

    return Supervisor(settings, os.environ)


def _store(settings: Settings) -> RunStore:
    from tinker_mcp.store.runs import RunStore

    return RunStore(settings.home)


def of_key(settings: Settings, idempotency_key: str | None) -> RunRow | None:
    """The run that was started with this key."""
    from tinker_mcp.store.runs import exists

    if idempotency_key is None or not exists(settings.home):
        return None
    with _store(settings) as store:
        return store.by_key(idempotency_key)


def summary(settings: Settings, run_id: str) -> RunSummary:
    """A run in short.

    Raises:
        NotFoundError: There is none of this id.
    """
    from tinker_mcp.runs.showing import views

    row = supervisor(settings).run(run_id)
    with _store(settings) as store:
        return views.summary(store, row)


def _secrets(settings: Settings) -> list[str]:
    return [secret for secret in (settings.api_key, settings.http_token) if secret]
