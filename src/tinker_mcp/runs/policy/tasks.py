"""Tasks that run together and end together: none is left behind, however a block ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_AT_ONCE = 1024  # each a group of samples, and so a request or more


async def together(work: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """All results, in order; the first failure ends the rest, and is raised as it is."""
    at_once = asyncio.Semaphore(_AT_ONCE)

    async def limited(one: Callable[[], Awaitable[T]]) -> T:
        async with at_once:
            return await one()

    tasks = [asyncio.ensure_future(limited(one)) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await ended(tasks)


@contextlib.asynccontextmanager
async def background() -> AsyncIterator[Callable[[Any], asyncio.Task[Any]]]:
    """Starts tasks; those that still run when the block ends are ended."""
    tasks: list[asyncio.Task[Any]] = []

    def start(work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        task.add_done_callback(lambda over: over.cancelled() or over.exception())
        tasks[:] = [one for one in tasks if not one.done()]
        tasks.append(task)
        return task

    try:
        yield start
    finally:
        await ended(tasks)


async def ended(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel what is not done, and wait until it is."""
    left = [task for task in tasks if not task.done()]
    for task in left:
        task.cancel()
    if left:
        await asyncio.gather(*left, return_exceptions=True)
