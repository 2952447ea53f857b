"""What a run tells the world: its numbers, checkpoints, cost and state, written as they come.

Each line goes to the run's files and to the store in one transaction under the worker's lease, so
a worker that was replaced writes neither. The store is the truth; a file that cannot be written
(a full disk) is caught up with later and ends no run.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog

from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.loggers import Loggers
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.runs.states import RunState, StopReason
from tinker_mcp.store.rows import CheckpointRow, MetricKind, MetricRow, StopAsked
from tinker_mcp.store.runs import LeaseLostError, RunStore

log = structlog.get_logger()

_TOKENS_A_PRICE = 1e6
_STORE_WAIT_S = 600.0  # for another run's worker that is stuck amid a write: nothing is lost by it
_BEFORE_ALL = -1  # the step that `rewind` goes back to where there is no checkpoint


class Journal:
    """The worker's pen. For the thread that made it, except for `asked` and `terminated`.

    Attributes:
        spec: What the run does.
        asked: How somebody asked it to stop, as the heartbeat last read it.
        terminated: Whether this process was told to end (SIGTERM), which means a stop with save.
        spent_usd: What was submitted so far cost, in all of the run's lives.
        furthest_step: The highest step that was recorded in this process.
    """

    def __init__(self, home: Path, run_id: str, lease: str) -> None:
        """Open the store.

        Raises:
            NotFoundError: There is no such run.
            LeaseLostError: It has another worker.
        """
        self._run_id, self._lease = run_id, lease
        self._store = RunStore(home, wait_s=_STORE_WAIT_S)
        row = self._store.get(run_id)
        if row.lease != lease:
            self._store.close()
            raise LeaseLostError(f"{run_id} has another worker")
        self.spec = RunSpec.model_validate_json(row.spec)
        self.folder = RunFolder.of(home, run_id)
        self.asked: StopAsked | None = None
        self.terminated = False
        self.spent_usd = row.usd
        self.furthest_step = _BEFORE_ALL
        self._told: tuple[str, str | None] = (row.state, row.detail)
        self._unwritten: deque[Callable[[], None]] = deque()
        self._loggers: Loggers | None = None

    @property
    def stop_asked(self) -> StopAsked | None:
        """Whether the run shall stop, and save first."""
        return self.asked or ("save" if self.terminated else None)

    def close(self) -> None:
        """End the optional loggers, close the store."""
        self._close_loggers()
        self._store.close()

    def _close_loggers(self) -> None:
        if self._loggers is not None:
            self._loggers.close()
            self._loggers = None

    # An attempt

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the numbers of the optim_step that led to `step`.

        Raises:
            LeaseLostError: Another worker has the run; so do all that write.
        """
        self._record("train", step, numbers)
        self.furthest_step = max(self.furthest_step, step)

    def evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the held-out numbers under the weights at `step`."""
        self._record("eval", step, numbers)

    def checkpoint(self, step: int, state_path: str, sampler_path: str, is_final: bool) -> None:
        """Record what a resume begins with, once both exist."""
        row = CheckpointRow(step, time.time(), state_path, sampler_path, is_final)
        with self._store.under(self._run_id, self._lease):
            self._mirror(lambda: self.folder.append_checkpoint(row))
            self._store.record_checkpoint(
                self._run_id, self._lease, step, state_path, sampler_path, is_final
            )
        log.info("checkpoint", step=step, state_path=state_path, is_final=is_final)

    def spend(self, tokens: int, usd: float | None = None) -> None:
        """Count tokens that are about to be submitted, at the price of training by default."""
        if usd is None:
            usd = tokens * (self.spec.usd_per_million or 0.0) / _TOKENS_A_PRICE
        self._store.spend(self._run_id, self._lease, tokens, usd)
        self.spent_usd += usd

    def warn(self, text: str) -> None:
        """Keep a warning, which summaries of the run show."""
        log.warning(text)
        self._store.tell(self._run_id, self._lease, "warning", text)

    def note(self, text: str) -> None:
        """Keep a remark."""
        log.info(text)
        self._store.tell(self._run_id, self._lease, "note", text)

    def metrics(self, kind: MetricKind) -> Sequence[MetricRow]:
        """What is recorded so far, by step."""
        return self._store.metrics(self._run_id, kind)

    # The worker

    def rewind(self) -> CheckpointRow | None:
        """Forget what came after the last checkpoint, which will come again; that checkpoint."""
        with self._store.under(self._run_id, self._lease):
            start = self._store.rewind(self._run_id, self._lease)
            step = start.step if start else _BEFORE_ALL
            self._mirror(lambda: self.folder.rewind(step))
        self._close_loggers()
        self._loggers = Loggers(
            self.spec, self.folder, start_step=max(0, step), environ=os.environ, warn=self.warn
        )
        return start

    def running(self) -> None:
        """It works."""
        self._move("running")

    def waiting(self, why: str) -> None:
        """It cannot go on for now."""
        self._move("waiting", detail=why)

    def end(self, state: RunState, reason: StopReason | None, detail: str | None) -> None:
        """Write how it ended."""
        self._move(state, reason=reason, detail=detail)
        self._mirror(lambda: None)

    def _move(
        self, state: RunState, *, reason: StopReason | None = None, detail: str | None = None
    ) -> None:
        if self._told == (state, detail):
            return
        self._store.move(self._run_id, self._lease, state, reason=reason, detail=detail)
        self._told = (state, detail)
        log.info(state, reason=reason, detail=detail)

    def _record(self, kind: MetricKind, step: int, numbers: Mapping[str, float]) -> None:
        with self._store.under(self._run_id, self._lease):
            self._mirror(lambda: self.folder.append_metrics(step, numbers))
            self._store.record(self._run_id, self._lease, kind, step, numbers)
        log.info(kind, step=step, **numbers)
        if self._loggers is not None:
            self._loggers.log(kind, step, numbers)

    def _mirror(self, write: Callable[[], None]) -> None:
        """Write to the run's files, after what could not be written before."""
        is_news = not self._unwritten
        self._unwritten.append(write)
        try:
            while self._unwritten:
                self._unwritten[0]()
                self._unwritten.popleft()
        except OSError as error:
            if is_news:
                self.warn(f"The run's files lag behind: {error.strerror or error}.")
