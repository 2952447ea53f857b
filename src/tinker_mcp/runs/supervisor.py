"""Starts, watches, stops and resumes runs. Any number of supervisors may share a home.

A run belongs to whoever holds its lease; taking it is one transaction of the store, so of two that
start or resume a run at the same moment one wins. The workers are no part of this process: they
outlive it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import structlog

from tinker_mcp.errors import InvalidInputError, NotFoundError, StoreBusyError
from tinker_mcp.runs import repeated, stuck, which
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.runs.states import ACTIVE, CRASHED_AFTER_S, HEARTBEAT_S, RunState, told
from tinker_mcp.settings import Settings
from tinker_mcp.store.rows import RunRow
from tinker_mcp.store.runs import LeaseLostError, RunStore, exists

if TYPE_CHECKING:
    from tinker_mcp.runs.planning.plan import Planned

log = structlog.get_logger()

_MISSED_BEAT_S = 1.5 * HEARTBEAT_S
_UNWANTED = ("TINKER_MCP_TOKEN", "TINKER_MCP_ROOTS", "TINKER_MCP_TOOLSETS", "TINKER_MCP_READ_ONLY")


class Supervisor:
    """The runs of one home. All methods block for milliseconds, `start` for the data's size."""

    def __init__(self, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
        """`environ` is what a worker gets, with the settings written over it."""
        self._settings = settings
        self._environ = environ

    def start(
        self,
        planned: Planned,
        idempotency_key: str | None = None,
        asked: RunArguments | None = None,
    ) -> RunRow:
        """Keep a run and start its worker; with a key that is known, the run it started.

        Args:
            asked: What it was planned from, which another start of the same key must equal.

        Raises:
            InvalidInputError: The key has started a run with other arguments.
        """
        with RunStore(self._settings.home) as store:
            known = store.by_key(idempotency_key) if idempotency_key else None
            row = known or self._added(store, planned, idempotency_key, asked)
            if asked is not None:
                repeated.check_same(row, asked)
            if row.lease is None:  # else this or another supervisor has started it
                self._hand_over(store, row)
        return self.run(row.run_id)

    def resume(
        self,
        run_id: str,
        *,
        steps: int | None = None,
        max_usd: float | None = None,
        accept_divergence: bool = False,
    ) -> RunRow:
        """Start a run again from its last checkpoint, where it ended or its worker died.

        Args:
            steps: Of the whole run, more than it had.
            max_usd: What the whole run may cost.
            accept_divergence: Have it go on whatever its loss does.

        Raises:
            NotFoundError: No such run.
            InvalidInputError: It is at work or complete, would stop again at once, or was planned
                for another backend.
        """
        row = self.run(run_id)
        spec = _changed(RunSpec.model_validate_json(row.spec), steps, max_usd, accept_divergence)
        self._check_resumable(row, spec)
        with RunStore(self._settings.home) as store:
            if not self._hand_over(store, row, spec):
                raise _at_work(run_id, "has just been resumed by another call")
        return self.run(run_id)

    def stop(self, run_id: str, *, save: bool) -> RunRow:
        """Ask a run's worker to stop; where it is dead, write that the run is stopped.

        A run that has ended stays as it is.

        Raises:
            NotFoundError: No such run.
        """
        row = self.run(run_id)
        with RunStore(self._settings.home) as store:
            if row.state == "crashed":
                detail = f"Its worker had died after step {row.step}; stop_run put an end to it."
                end = partial(store.end_dead, run_id, _new_lease(), detail, before=row.lease)
                _past_its_worker(row, end)
            elif row.state in ACTIVE:
                store.ask_to_stop(run_id, "save" if save else "drop")
        return self.run(run_id)

    def runs(self) -> list[RunRow]:
        """All runs, the newest first, each in the state to tell of it."""
        if not exists(self._settings.home):
            return []
        with RunStore(self._settings.home) as store:
            return [as_told(row) for row in store.newest()]

    def run(self, run_id: str) -> RunRow:
        """A run, in the state to tell of it.

        Raises:
            NotFoundError: No such run.
        """
        if not exists(self._settings.home):
            raise NotFoundError(
                f"No run {run_id!r}; there is none yet.", next_step="Call start_run to start one."
            )
        with RunStore(self._settings.home) as store:
            return as_told(store.get(run_id))

    def find(self, text: str) -> RunRow:
        """The run that is meant by its id, by a name that no other has, or by an id's beginning.

        Raises:
            NotFoundError: None is.
            InvalidInputError: Several are.
        """
        return which.only(which.fitting(self.runs(), text)) or self.run(text)

    def _added(
        self,
        store: RunStore,
        planned: Planned,
        idempotency_key: str | None,
        asked: RunArguments | None,
    ) -> RunRow:
        """Its row, and its folder, which is there first."""
        run_id = f"{planned.spec.method}-{secrets.token_hex(4)}"
        folder = RunFolder.of(self._settings.home, run_id)
        try:
            spec = _with_data(planned, folder)
            folder.create(spec, run_id, planned.estimate.price)
            row = store.add(
                run_id,
                spec.model_dump_json(),
                idempotency_key,
                arguments=None if asked is None else repeated.kept(asked),
                warnings=planned.warnings,
            )
        except BaseException:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        if row.run_id != run_id:  # another supervisor was faster with the same key
            shutil.rmtree(folder.path, ignore_errors=True)
        return row

    def _hand_over(self, store: RunStore, row: RunRow, spec: RunSpec | None = None) -> bool:
        """Give a run to a new worker, unless somebody else has done so since `row` was read."""
        lease = _new_lease()
        changed = None if spec is None else spec.model_dump_json()
        take = partial(store.take, row.run_id, lease, None, before=row.lease, spec=changed)
        if not _past_its_worker(row, take):
            return False
        if spec is not None:
            RunFolder.of(self._settings.home, row.run_id).write_config(spec, row.run_id)
        pid = self._spawn(row.run_id, lease)
        try:
            store.beat(row.run_id, lease, pid)  # until it does so itself: it may die before
        except LeaseLostError:
            log.info("run_was_taken_over", run_id=row.run_id)
        return True

    def _spawn(self, run_id: str, lease: str) -> int:
        folder = RunFolder.of(self._settings.home, run_id)
        descriptor = os.open(folder.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tinker_mcp.runs.worker", run_id, lease],
                env=self._worker_environ(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
            )
        # It reaps the worker at once, whenever that ends: a zombie still has a pid.
        threading.Thread(target=process.wait, name=f"reaper of {run_id}", daemon=True).start()
        log.info("worker_started", run_id=run_id, pid=process.pid)
        return process.pid

    def _worker_environ(self) -> dict[str, str]:
        """What a worker needs to find the same home and backend, and no key that it does not."""
        settings = self._settings
        values = {
            "TINKER_MCP_HOME": str(settings.home),
            "TINKER_MCP_BACKEND": "local" if settings.is_local else "hosted",
            "TINKER_LOCAL_CACHE": str(settings.local_cache),
            "TINKER_BASE_URL": settings.base_url,
            "TINKER_API_KEY": None if settings.is_local else settings.api_key,
        }
        kept = {
            name: value
            for name, value in self._environ.items()
            if name not in values and name not in _UNWANTED
        }
        return kept | {name: value for name, value in values.items() if value is not None}

    def _check_resumable(self, row: RunRow, spec: RunSpec) -> None:
        if row.state in ACTIVE:
            raise _at_work(row.run_id, f"is {row.state}, at step {row.step}")
        if row.state == "completed" and spec.steps <= row.step:
            raise InvalidInputError(
                f"{row.run_id} is complete after {row.step} steps.",
                next_step=f"Give steps above {row.step} to train it further.",
            )
        if spec.steps < row.step:
            raise InvalidInputError(
                f"{row.run_id} is at step {row.step}, past steps={spec.steps}.",
                next_step=f"Give steps above {row.step}, or none.",
            )
        if spec.max_usd is not None and row.usd >= spec.max_usd:
            raise InvalidInputError(
                f"{row.run_id} has spent ${row.usd:.4f} of max_usd ${spec.max_usd:.4f}.",
                next_step="Call resume_run with a higher max_usd, which counts from its start.",
            )
        if row.reason == "divergence" and spec.stops_on_divergence:
            raise InvalidInputError(
                f"{row.run_id} would diverge again: {row.detail}",
                next_step="Call start_run with a lower learning_rate; resume_run with "
                "accept_divergence=true goes on all the same.",
            )
        if self._settings.is_local != (spec.backend == "local"):
            raise InvalidInputError(
                f"{row.run_id} belongs to the {spec.backend} backend, this server to another.",
                next_step=f"Restart the server with --backend {spec.backend}, then resume it.",
            )


def _past_its_worker(row: RunRow, write: Callable[[], bool]) -> bool:
    """Write to a run; where its worker seems dead and is stuck amid a write, end it before."""
    try:
        return write()
    except StoreBusyError:
        if row.state != "crashed" or not stuck.end_worker(row):
            raise
        return write()


def as_told(row: RunRow) -> RunRow:
    """The row with the state to tell of it; a crashed one says so in its `detail`."""
    age_s = time.time() - row.heartbeat_at
    written = cast("RunState", row.state)
    # A fresh beat outweighs a missing process: it may be one of another container.
    state = told(written, age_s, is_process_gone=age_s > _MISSED_BEAT_S and _is_gone(row.pid))
    if state == row.state:
        return row
    how = f"gave no sign of life for {CRASHED_AFTER_S:.0f} s" if age_s > CRASHED_AFTER_S else "died"
    detail = f"Its worker {how}; its last recorded step is {row.step}."
    return replace(row, state=state, detail=detail)


def _is_gone(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # none, or one of another user's by now
        return True
    return False


def _with_data(planned: Planned, folder: RunFolder) -> RunSpec:
    """Write the data to the folder; the spec with the hashes of the files."""
    from tinker_mcp.runs import kept  # and numpy

    spec = planned.spec
    sha256 = kept.save(folder, spec.method, "train", planned.train)
    changed = {"train": spec.train.model_copy(update={"sha256": sha256})}
    if spec.held_out is not None:
        sha256 = kept.save(folder, spec.method, "held_out", planned.held_out)
        changed["held_out"] = spec.held_out.model_copy(update={"sha256": sha256})
    return spec.model_copy(update=changed)


def _changed(
    spec: RunSpec, steps: int | None, max_usd: float | None, accept_divergence: bool
) -> RunSpec:
    """The spec with what a resume asks for.

    Raises:
        InvalidInputError: That is no spec.
    """
    asked = {
        "steps": steps,
        "max_usd": max_usd,
        "stops_on_divergence": False if accept_divergence else None,
    }
    for name in ("steps", "max_usd"):
        value = asked[name]
        if value is not None and value <= 0:
            raise InvalidInputError(f"{name}={value} is not above 0.", next_step="Give more.")
    given = {name: value for name, value in asked.items() if value is not None}
    return spec.model_copy(update=given)


def _at_work(run_id: str, what: str) -> InvalidInputError:
    return InvalidInputError(
        f"{run_id} {what}.", next_step="Call get_run or wait_for_run; stop_run would stop it."
    )


def _new_lease() -> str:
    return secrets.token_hex(8)
