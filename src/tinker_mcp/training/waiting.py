"""Waiting for the SDK, but never for ever.

The SDK retries for six minutes and more when its server is dead. So each wait has a deadline of
its own and an eye on the backend's health; a wait that runs out leaves the work running, and the
same call made again meets it.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tinker_mcp.errors import BackendGoneError, TinkerMcpError
from tinker_mcp.training.backend import Backend

T = TypeVar("T")

_LOOK_EVERY_S = 2.0
_SETTLE_S = 1.0
_MISSES_UNTIL_DEAD = 2  # 4 s apart from the last sign of life; one may be a hiccup of the net


async def wait(tasks: set[asyncio.Task[Any]], backend: Backend | None, deadline: float) -> bool:
    """Wait until all tasks are done; False when `deadline` (monotonic) came first.

    Cancels nothing. Work without a backend is work of this process alone.

    Raises:
        BackendGoneError: Nothing listens at the backend's address any more.
    """
    misses = 0
    while pending := {task for task in tasks if not task.done()}:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        done, _ = await asyncio.wait(pending, timeout=min(left, _LOOK_EVERY_S))
        # A silent backend may be busy; the deadline takes care of it.
        absence = None if done or backend is None else await backend.absence()
        misses = misses + 1 if isinstance(absence, BackendGoneError) else 0
        if absence is not None and misses >= _MISSES_UNTIL_DEAD:
            raise absence
    return True


@dataclass
class Shared:
    """Work that equal calls have in common.

    Attributes:
        task: The work itself, once it was started.
        wanted: Set while a call waits for it.
        is_committed: Whether it has begun what somebody must be there to hear of.
    """

    task: asyncio.Task[Any] | None = None
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    is_committed: bool = False
    _waiting: int = 0
    _owed: int = 0  # calls that were told to come again

    def joined(self) -> None:
        """Count a call that waits from now on; it may be one that was told to come again."""
        self._owed = max(0, self._owed - (self.task is not None))
        self._waiting += 1
        self.wanted.set()

    def left(self, *, is_owed: bool) -> bool:
        """Count a call that does not wait any more; whether nobody is left to hear the result."""
        self._owed += is_owed
        self._waiting -= 1
        if not self._waiting:
            self.wanted.clear()
        return not self._waiting and not self._owed

    async def commit(self) -> None:
        """Go on, in the work itself, once a call waits for it."""
        while not self._waiting:
            await self.wanted.wait()
        self.is_committed = True


class Unfinished:
    """Work that outlived the call which asked for it, by what it was asked with."""

    def __init__(self) -> None:
        self._left: defaultdict[Hashable, deque[asyncio.Task[Any]]] = defaultdict(deque)
        self._shared: dict[Hashable, Shared] = {}
        self._running: set[asyncio.Task[Any]] = set()

    async def finish(
        self,
        key: Hashable,
        start: Callable[[], Awaitable[T]],
        backend: Backend | None,
        deadline: float,
    ) -> T | None:
        """The result of `start()`, or None when it is not there by `deadline`.

        A later call with an equal `key` takes over what an earlier one left, at its deadline or
        because it was cancelled, instead of starting anew. Calls that wait at the same time each
        have work of their own: two equal forward_backwards are two gradients.

        Raises:
            BackendGoneError: The backend has ended; the work is given up.
        """
        return await self.collect(key, self.begin(key, start), backend, deadline)

    def begin(self, key: Hashable, start: Callable[[], Awaitable[T]]) -> asyncio.Task[T]:
        """The work of `key` that an earlier call left, or `start()` as a new task."""
        return self._taken_over(key) or self._started(start)

    async def collect(
        self, key: Hashable, task: asyncio.Task[T], backend: Backend | None, deadline: float
    ) -> T | None:
        """The result of a task from `begin`, or None: then it is left for a later call.

        Raises:
            BackendGoneError: The backend has ended; the work is given up.
        """
        try:
            is_done = await wait({task}, backend, deadline)
        except TinkerMcpError:
            abandon(task)
            await asyncio.wait({task}, timeout=_SETTLE_S)  # until it has taken back what it counted
            raise
        except asyncio.CancelledError:
            self._left[key].append(task)
            raise
        if not is_done:
            self._left[key].append(task)
            return None
        return task.result()

    async def share(
        self, key: Hashable, start: Callable[[Shared], Awaitable[T]], deadline: float
    ) -> T | None:
        """Like `finish`, for work that must not be done twice: equal calls share it.

        So do calls that wait at the same time. The result is kept until every call that was told
        None has come again; an equal call after that starts anew.
        """
        shared = self._shared.setdefault(key, Shared())
        shared.joined()
        if shared.task is None:
            shared.task = self._started(lambda: start(shared))
        is_done = False
        try:
            is_done = await wait({shared.task}, None, deadline)
        finally:
            if shared.left(is_owed=not is_done):
                self._shared.pop(key, None)
        result: T | None = shared.task.result() if is_done else None
        return result

    def shared(self, key: Hashable) -> Shared | None:
        """The work of `key` that an equal call would join."""
        return self._shared.get(key)

    def forget(self) -> None:
        """Let nothing that was left be taken over any more; it still runs to its end."""
        self._left.clear()
        self._shared.clear()

    def close(self) -> None:
        """Give up all of it."""
        for task in self._running:
            abandon(task)
        self._left.clear()
        self._shared.clear()

    def _taken_over(self, key: Hashable) -> asyncio.Task[Any] | None:
        waiting = self._left.pop(key, deque())
        task = waiting.popleft() if waiting else None
        if waiting:
            self._left[key] = waiting
        return task

    def _started(self, start: Callable[[], Awaitable[Any]]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(_as_coroutine(start()))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # Whoever left it may never come back to hear how it failed.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return task


class Turns(Unfinished):
    """Unfinished work that changes one training client.

    Once something new is asked of the client, what was left before cannot be collected any more:
    an equal call then means a new gradient or a new step, not the old one's result.
    """

    def _started(self, start: Callable[[], Awaitable[Any]]) -> asyncio.Task[Any]:
        self.forget()
        return super()._started(start)


def abandon(task: asyncio.Task[Any]) -> None:
    """Stop waiting for a task, and take note of its end so that asyncio does not complain."""
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    task.cancel()


async def _as_coroutine(work: Awaitable[T]) -> T:
    return await work
