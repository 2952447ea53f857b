"""Waiting for the SDK, but never for ever.

The SDK retries for six minutes and more when its server is dead. So each wait has a deadline of
its own and an eye on the backend's health; a wait that runs out leaves the work running, and the
same call made again meets it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.training.backend import Backend, unreachable

T = TypeVar("T")

_LOOK_EVERY_S = 2.0
_MISSES_UNTIL_DEAD = 2  # two misses are at most 9 s; one may be a busy machine


async def wait(tasks: set[asyncio.Task[Any]], backend: Backend, deadline: float) -> bool:
    """Wait until all tasks are done; False when `deadline` (monotonic) came first.

    Cancels nothing.

    Raises:
        BackendUnreachableError: The backend stopped answering meanwhile.
    """
    misses = 0
    while pending := {task for task in tasks if not task.done()}:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        done, _ = await asyncio.wait(pending, timeout=min(left, _LOOK_EVERY_S))
        if done or await backend.is_healthy():
            misses = 0
        else:
            misses += 1
            if misses >= _MISSES_UNTIL_DEAD:
                raise unreachable(backend)
    return True


class Unfinished:
    """Work that outlived the call which asked for it, by what it was asked with."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}

    async def finish(
        self,
        key: Hashable,
        start: Callable[[], Awaitable[T]],
        backend: Backend,
        deadline: float,
    ) -> T | None:
        """The result of `start()`, or None when it is not there by `deadline`.

        Called again with an equal `key` while the first is unfinished, it waits for that one
        instead of starting a second.

        Raises:
            BackendUnreachableError: The backend stopped answering; the work is given up.
        """
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.ensure_future(_as_coroutine(start()))
        try:
            is_done = await wait({task}, backend, deadline)
        except TinkerMcpError:
            self._tasks.pop(key, None)
            abandon(task)
            raise
        if not is_done:
            return None
        self._tasks.pop(key, None)
        if task.cancelled():  # another call that waited for it found the backend dead
            raise unreachable(backend)
        result: T = task.result()
        return result

    def close(self) -> None:
        """Give up all of it."""
        for task in self._tasks.values():
            abandon(task)
        self._tasks.clear()


def abandon(task: asyncio.Task[Any]) -> None:
    """Stop waiting for a task, and take note of its end so that asyncio does not complain."""
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    task.cancel()


async def _as_coroutine(work: Awaitable[T]) -> T:
    return await work
