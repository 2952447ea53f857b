"""Calls on one client submit their requests in the order in which they arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tinker_mcp.training.clients import OpenClient, Workspace, told_about
from tinker_mcp.training.waiting import Unfinished

T = TypeVar("T")


@dataclass(frozen=True)
class Work(Generic[T]):
    """What a call does with a client: `start` submits before it first awaits."""

    waiting: Unfinished
    key: Hashable
    start: Callable[[], Awaitable[T]]


async def submitted_in_turn(
    workspace: Workspace,
    client_id: str,
    deadline: float,
    prepare: Callable[[OpenClient], Awaitable[Work[T] | None]],
) -> T | None:
    """Submit in order of arrival, then wait for the answer without keeping others from theirs.

    Calls on one client hold its `order` one after the other, for as long as it takes to see that
    its backend answers and to `prepare`; what that gives is submitted before the next call's.

    Returns:
        The work's result; None when it takes longer than a call may, or `prepare` says so.

    Raises:
        ClientLostError: The client is gone, and work went with it.
        BackendUnreachableError: The backend does not answer.
    """
    order = workspace.client(client_id).order
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            await order.acquire()
    except TimeoutError:
        return None
    try:
        client = await workspace.live_client(client_id)
        with told_about(client):
            work = await prepare(client)
        if work is None:
            return None
        # Tasks begin in the order of their making, so this one submits before any later call's.
        task = work.waiting.begin(work.key, work.start)
    finally:
        order.release()
    with told_about(client):
        result = await work.waiting.collect(work.key, task, client.backend, deadline)
    if result is not None:
        client.heard()
    return result
