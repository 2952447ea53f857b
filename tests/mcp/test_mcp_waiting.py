"""Waiting with a deadline, an eye on the backend, and work that several calls share."""

from __future__ import annotations

import asyncio
import time

import pytest

from servers import LocalServer
from tinker_mcp.errors import BackendGoneError
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.waiting import Shared, Turns, Unfinished, wait


async def value(event: asyncio.Event, result: str = "done") -> str:
    await event.wait()
    return result


async def test_a_wait_ends_at_its_deadline_and_the_work_goes_on(backend: Backend) -> None:
    event, unfinished = asyncio.Event(), Unfinished()
    began = time.monotonic()
    first = await unfinished.finish("k", lambda: value(event), backend, began + 0.1)
    assert first is None
    assert 0.1 <= time.monotonic() - began < 1
    event.set()
    assert await unfinished.finish("k", never, backend, time.monotonic() + 5) == "done"


async def test_calls_that_wait_at_the_same_time_have_work_of_their_own(backend: Backend) -> None:
    both, unfinished = asyncio.Barrier(2), Unfinished()

    async def start() -> str:
        await both.wait()  # passes only where two have started
        return "done"

    deadline = time.monotonic() + 5
    calls = [unfinished.finish("k", start, backend, deadline) for _ in "ab"]
    assert await asyncio.gather(*calls) == ["done", "done"]


async def test_a_cancelled_call_leaves_its_work_to_the_next(backend: Backend) -> None:
    begun, event, unfinished = asyncio.Event(), asyncio.Event(), Unfinished()

    async def start() -> str:
        begun.set()
        return await value(event)

    deadline = time.monotonic() + 5
    call = asyncio.create_task(unfinished.finish("k", start, backend, deadline))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    event.set()
    assert await unfinished.finish("k", never, backend, deadline) == "done"


async def test_what_two_calls_left_is_taken_over_in_their_order(backend: Backend) -> None:
    events, unfinished = [asyncio.Event(), asyncio.Event()], Unfinished()
    now = time.monotonic()
    await asyncio.gather(
        unfinished.finish("k", lambda: value(events[0], "first"), backend, now + 0.1),
        unfinished.finish("k", lambda: value(events[1], "second"), backend, now + 0.2),
    )
    for event in events:
        event.set()
    took = [await unfinished.finish("k", never, backend, now + 5) for _ in "ab"]
    assert took == ["first", "second"]


async def test_new_work_on_a_client_makes_what_was_left_uncollectable(backend: Backend) -> None:
    left, new, turns = asyncio.Event(), asyncio.Event(), Turns()
    now = time.monotonic()
    assert await turns.finish("step", lambda: value(left, "old"), backend, now + 0.1) is None
    left.set()
    new.set()
    await turns.finish("gradient", lambda: value(new), backend, now + 5)
    assert await turns.finish("step", lambda: value(new, "new"), backend, now + 5) == "new"


async def test_other_keys_are_other_work(backend: Backend) -> None:
    event, unfinished = asyncio.Event(), Unfinished()
    event.set()
    deadline = time.monotonic() + 5
    a = await unfinished.finish("a", lambda: value(event, "A"), backend, deadline)
    b = await unfinished.finish("b", lambda: value(event, "B"), backend, deadline)
    assert (a, b) == ("A", "B")


async def test_finished_work_starts_anew_and_so_does_failed_work(backend: Backend) -> None:
    unfinished = Unfinished()
    deadline = time.monotonic() + 5
    with pytest.raises(RuntimeError, match="never"):
        await unfinished.finish("k", never, backend, deadline)
    for expected in ("first", "second"):
        event = asyncio.Event()
        event.set()
        start = lambda event=event, expected=expected: value(event, expected)  # noqa: E731
        assert await unfinished.finish("k", start, backend, deadline) == expected


async def test_a_dead_backend_is_told_in_seconds_to_every_call_that_waits(
    own_server: LocalServer,
) -> None:
    dead = Backend("local", own_server.base_url, own_server.api_key)
    own_server.kill()
    unfinished, event = Unfinished(), asyncio.Event()
    began = time.monotonic()

    async def call() -> str | None:
        return await unfinished.finish("k", lambda: value(event), dead, began + 45)

    outcomes = await asyncio.gather(call(), call(), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BackendGoneError] * 2
    assert time.monotonic() - began < 10


async def test_a_slow_healthy_backend_is_waited_for(backend: Backend) -> None:
    event = asyncio.Event()
    task = asyncio.create_task(value(event))
    looks = 2.5  # longer than the first look at the backend's health, after 2 s
    asyncio.get_running_loop().call_later(looks, event.set)
    assert await wait({task}, backend, time.monotonic() + 10)


async def test_shared_work_is_done_once_for_those_who_wait_and_those_who_come_again() -> None:
    event, unfinished, starts = asyncio.Event(), Unfinished(), 0

    async def start(_: Shared) -> str:
        nonlocal starts
        starts += 1
        return await value(event)

    async def call(limit_s: float) -> str | None:
        return await unfinished.share("k", start, time.monotonic() + limit_s)

    patient = asyncio.create_task(call(30))
    assert await call(0.01) is None
    event.set()
    assert await patient == "done"
    assert (await call(30), starts) == ("done", 1)
    assert (await call(30), starts) == ("done", 2)


async def test_shared_work_commits_only_while_a_call_waits_for_it() -> None:
    begun, go, ready = asyncio.Event(), asyncio.Event(), asyncio.Event()
    unfinished = Unfinished()

    async def start(shared: Shared) -> str:
        begun.set()
        await go.wait()
        ready.set()
        await shared.commit()
        return "started"

    call = asyncio.create_task(unfinished.share("k", start, time.monotonic() + 30))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go.set()
    await ready.wait()
    left = unfinished.shared("k")
    assert left is not None
    assert not left.is_committed
    assert await unfinished.share("k", start, time.monotonic() + 30) == "started"
    assert unfinished.shared("k") is None


async def never() -> str:
    raise RuntimeError("never to be started twice")
