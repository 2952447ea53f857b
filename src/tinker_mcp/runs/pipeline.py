"""What an attempt has in flight: submitted in order, answered any time, recorded in order.

A step is submitted while the one before it is still being computed, so that no clock cycle passes
empty. Evaluations and checkpoints stand in the same line, which holds no step back: only what is
written down waits for its turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tinker_mcp.errors import BackendUnreachableError, ClientLostError, TinkerMcpError
from tinker_mcp.training import sdk_errors
from tinker_mcp.training.loop import IN_FLIGHT
from tinker_mcp.training.waiting import abandon

UNRECORDED = 8
"""Entries at most. A checkpoint that takes long has so many steps done behind it, unrecorded."""

_SETTLE_S = 30.0
_CANCEL_S = 1.0

Wait = Callable[[set[asyncio.Task[Any]]], Awaitable[None]]
Record = Callable[..., None]


@dataclass(frozen=True)
class _Entry:
    """Requests that were submitted together, and what to do with their answers."""

    tasks: Sequence[asyncio.Task[Any]]
    record: Record
    is_step: bool

    @property
    def is_answered(self) -> bool:
        return all(task.done() for task in self.tasks)

    @property
    def has_failed(self) -> bool:
        return any(
            task.done() and (task.cancelled() or task.exception() is not None)
            for task in self.tasks
        )


class Pipeline:
    """First in, first recorded. Leaves no task pending when its block ends.

    Args:
        wait: Waits for tasks; raises where their backend is gone.
    """

    def __init__(self, wait: Wait) -> None:
        self._wait = wait
        self._entries: deque[_Entry] = deque()

    def put(
        self, *requests: Coroutine[Any, Any, Any], record: Record, is_step: bool = False
    ) -> None:
        """Take what was just submitted; `record` gets the answers once it is their turn."""
        self._entries.append(_Entry([_watched(request) for request in requests], record, is_step))

    async def room(self) -> None:
        """Record what has come; wait while IN_FLIGHT steps are unanswered.

        Raises:
            TinkerMcpError: A request failed. Those behind it have ended and are not recorded.
        """
        await self._guarded(self._until_room)

    async def drain(self) -> None:
        """Wait for all of it, and record it.

        Raises:
            TinkerMcpError: As `room` does.
        """
        await self._guarded(self._until_empty)

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self._give_up()

    async def _until_room(self) -> None:
        while True:
            self._record_answered()
            unanswered = [e for e in self._entries if e.is_step and not e.is_answered]
            if any(entry.has_failed for entry in self._entries):
                await self._until_empty()  # up to the failure, which this raises
            elif len(unanswered) >= IN_FLIGHT:
                await self._wait(set(unanswered[0].tasks))
            elif len(self._entries) >= UNRECORDED:
                await self._wait(set(self._entries[0].tasks))
            else:
                return

    async def _until_empty(self) -> None:
        while self._entries:
            await self._wait(set(self._entries[0].tasks))
            self._record_answered()

    def _record_answered(self) -> None:
        while self._entries and self._entries[0].is_answered:
            entry = self._entries.popleft()
            entry.record(*map(_answer, entry.tasks))

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except (BackendUnreachableError, ClientLostError):
            raise  # nothing behind it will ever be answered
        except TinkerMcpError:
            # What is behind a failed request runs all the same, and shall not run beside the next
            # attempt.
            tasks = {task for entry in self._entries for task in entry.tasks}
            if tasks:
                await asyncio.wait(tasks, timeout=_SETTLE_S)
            self._entries.clear()
            raise

    async def _give_up(self) -> None:
        tasks = {task for entry in self._entries for task in entry.tasks if not task.done()}
        self._entries.clear()
        for task in tasks:
            abandon(task)
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_S)


def _answer(task: asyncio.Task[Any]) -> Any:
    if task.cancelled():  # by the SDK: it does so when its client is closed
        raise ClientLostError(
            "The training client gave up its requests.", next_step="Call resume_run."
        )
    with sdk_errors.told():
        return task.result()


def _watched(request: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task whose failure nobody needs to ask for: of several the first is told."""
    task = asyncio.create_task(request)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task
