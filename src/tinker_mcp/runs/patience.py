"""One attempt after the other until a run has an outcome: what is waited for, and what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from tinker_mcp.errors import (
    BackendStartingError,
    BackendUnreachableError,
    ClientLostError,
    InvalidInputError,
    TinkerMcpError,
)
from tinker_mcp.runs.attempt import Attempt, Outcome
from tinker_mcp.runs.journal import Journal
from tinker_mcp.runs.methods import Training
from tinker_mcp.store.runs import LeaseLostError
from tinker_mcp.training import sdk_errors
from tinker_mcp.training.backend import Backend, BackendConnector

log = structlog.get_logger()

FAILURES_LIMIT = 3
LOSSES_LIMIT = 10
"""Local backends that ended, or clients of theirs that were lost, in a row without a new step: then
the step itself ends them, by the memory that it takes, for one."""

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0
_LOOK_EVERY_S = 0.5
_SHOWN_CHARACTERS = 600
_LOST = (BackendUnreachableError, BackendStartingError, ClientLostError)
_DROP_AFTER_S = 10.0  # the method stops by itself between two steps; it may be stuck in one


class RunFailedError(Exception):
    """The run cannot go on; the sentence says why."""


@dataclass
class Endeavour:
    """A run, as the worker pursues it.

    Attributes:
        method: Whose `train` is the whole loop, from the last checkpoint to the end.
        train, held_out: To train on, and to evaluate on.
    """

    run_id: str
    journal: Journal
    connector: BackendConnector
    method: Training
    train: Sequence[Any]
    held_out: Sequence[Any]
    _failures: int = 0
    _losses: int = 0
    _pause_s: float = _FIRST_PAUSE_S
    _furthest: int = -1
    _is_local_at_work: bool = False

    async def pursue(self) -> Outcome:
        """Try until it is done, waiting for a backend that is gone.

        Raises:
            LeaseLostError: Another worker has the run.
            RunFailedError: It fails again and again at the same step.
        """
        while True:
            try:
                return await self._unless_dropped(self._attempt())
            except Exception as error:  # whatever kills an attempt is told, and mostly tried again
                leaf = _leaf(error)
                if isinstance(leaf, LeaseLostError):
                    raise leaf from error
                self._bear(leaf)
            if await self._pause():
                return _stopped("while it waited")

    async def _attempt(self) -> Outcome:
        self._is_local_at_work = False
        with sdk_errors.told():
            backend = await self.connector.connect()
            attempt = self._new_attempt(backend)
            self._is_local_at_work = backend.kind == "local"
            return await self.method.train(attempt)

    def _new_attempt(self, backend: Backend) -> Attempt:
        start = self.journal.rewind()
        self.journal.running()
        return Attempt(
            spec=self.journal.spec,
            train=self.train,
            held_out=self.held_out,
            journal=self.journal,
            backend=backend,
            run_id=self.run_id,
            start=start,
        )

    async def _unless_dropped(self, attempt: Coroutine[Any, Any, Outcome]) -> Outcome:
        """Its outcome; that of being stopped where it is to stop without saving and does not."""
        task = asyncio.ensure_future(attempt)
        dropped_for_s = 0.0
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK_EVERY_S)
            is_dropped = self.journal.stop_asked == "drop"
            dropped_for_s = dropped_for_s + _LOOK_EVERY_S if is_dropped else 0.0
            if dropped_for_s > _DROP_AFTER_S and not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_DROP_AFTER_S)
                return _stopped("without saving")
        if task.cancelled():  # the SDK gives up what it has in hand when a client of it is closed
            raise ClientLostError(
                "The training client gave up its requests.", next_step="Call resume_run."
            )
        return task.result()

    def _bear(self, error: Exception) -> None:
        """Take note of a failed attempt.

        Raises:
            RunFailedError: It was one too many, or there is no use in another.
        """
        log.warning("attempt_failed", exc_info=error)
        if self.journal.furthest_step > self._furthest:
            self._furthest = self.journal.furthest_step
            self._failures, self._losses, self._pause_s = 0, 0, _FIRST_PAUSE_S
        if isinstance(error, InvalidInputError):
            raise RunFailedError(sentence(error)) from error
        if not isinstance(error, _LOST):
            self._failures += 1
        elif self._is_local_at_work:
            self._losses += 1
        for count, limit in ((self._failures, FAILURES_LIMIT), (self._losses, LOSSES_LIMIT)):
            if count >= limit:
                raise RunFailedError(f"{count} times in a row: {sentence(error)}") from error
        self.journal.waiting(sentence(error))

    async def _pause(self) -> bool:
        """Wait before the next attempt, longer each time; whether to stop instead of it."""
        left_s = self._pause_s
        while left_s > 0 and not self.journal.stop_asked:
            await asyncio.sleep(min(left_s, _LOOK_EVERY_S))
            left_s -= _LOOK_EVERY_S
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return self.journal.stop_asked is not None


def sentence(error: BaseException) -> str:
    """What to tell of an error: the problem alone, since the next step differs for a run."""
    if isinstance(error, TinkerMcpError):
        return error.problem
    said = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
    return f"{type(error).__name__}: {said}" if said else f"{type(error).__name__}."


def _stopped(when: str) -> Outcome:
    return Outcome(
        "stopped", "user", f"Stopped {when}; what came after its last checkpoint is lost."
    )


def _leaf(error: Exception) -> Exception:
    """The first error of a group of a task group's, one of a lost backend before others."""
    if not isinstance(error, ExceptionGroup):
        return error
    leaves = [_leaf(one) for one in error.exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, (*_LOST, LeaseLostError))), leaves[0])
