"""Who runs next, in the order in which a recording engine was called."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinker_local.errors import UserInputError
from tinker_local.ops import BaseWeights, Sample, SampleOutput, Slices
from tinker_local.service.backend import Backend
from tinker_local.service.checkpoints import Catalog
from tinker_local.service.futures import Failure, Future, Reply
from tinker_local.service.scheduler import Job, Load, SampleJob, Scheduler, Work

BOUND_S = 5.0
OK = Reply(b"ok", "text/plain")
SLICE_S, TOKEN_S = 1.0, 0.25
ASKED = Sample(BaseWeights("org/base"), np.array([1]))


class _Recorder:
    """An engine that writes down what it is asked for, and what each of it takes.

    Attributes:
        now_s: What the scheduler takes for the time.
        left: Tokens still to come, by ticket.
        fault: Raised by the next continue_samples.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.now_s = 0.0
        self.left: dict[str, int] = {}
        self.fault: Exception | None = None
        self.drawing = threading.Event()

    def slices(self, name: str, count: int) -> Slices[Reply]:
        try:
            for number in range(count):
                self.calls.append(f"{name}{number}")
                self.now_s += SLICE_S
                yield
        finally:
            self.calls.append(f"{name} closed")
        return OK

    def start_sample(self, ticket: str, op: Sample) -> None:
        self.left[ticket] = op.max_tokens or 1

    def continue_samples(self) -> Mapping[str, SampleOutput | Exception]:
        self.calls.append("token")
        self.now_s += TOKEN_S
        self.drawing.set()
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.left = {ticket: left - 1 for ticket, left in self.left.items()}
        done = [ticket for ticket, left in self.left.items() if left == 0]
        return {ticket: SampleOutput([]) for ticket in done if self.left.pop(ticket) == 0}

    def stop_sample(self, ticket: str) -> None:
        self.calls.append(f"stop {ticket}")
        self.left.pop(ticket, None)

    def drop_model(self, model_id: str) -> None:
        self.calls.append(f"drop {model_id}")


class _Gate:
    """A job that keeps the engine's thread until it is opened."""

    def __init__(self) -> None:
        self._is_reached, self._is_open = threading.Event(), threading.Event()

    def work(self) -> Reply:
        self._is_reached.set()
        assert self._is_open.wait(BOUND_S)
        return OK

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._is_reached.wait, BOUND_S)

    def open(self) -> None:
        self._is_open.set()


@pytest.fixture
def engine() -> _Recorder:
    return _Recorder()


@pytest.fixture
async def scheduler(engine: _Recorder) -> Scheduler:
    any_engine: Any = engine
    return Scheduler(any_engine, now=lambda: engine.now_s)


@pytest.fixture
async def gate(scheduler: Scheduler) -> _Gate:
    """Closed, and the engine's thread stands before it: what is submitted now, waits."""
    gate = _Gate()
    _submit(scheduler, "gate", gate.work)
    await gate.reached()
    return gate


def _submit(scheduler: Scheduler, lane: str, work: Work) -> Future:
    future = Future(lane, "session")
    scheduler.submit(lane, Job(future, work))
    return future


def _sample(
    scheduler: Scheduler,
    ticket: str,
    tokens: int,
    encode: Callable[[SampleOutput], Reply] = lambda _: OK,
) -> Future:
    future = Future(ticket, "session")
    op = Sample(ASKED.weights, ASKED.prompt, max_tokens=tokens)
    scheduler.sample(SampleJob(future, lambda: op, encode))
    return future


async def _outcome(future: Future) -> Reply | Failure:
    outcome = await future.wait(BOUND_S)
    assert outcome is not None
    return outcome


async def test_training_clients_take_turns_slice_by_slice(
    scheduler: Scheduler, engine: _Recorder, gate: _Gate
) -> None:
    jobs = [
        _submit(scheduler, name, lambda n=name, c=count: engine.slices(n, c))
        for name, count in (("a", 3), ("b", 1), ("c", 2))
    ]

    gate.open()

    assert [await _outcome(job) for job in jobs] == [OK, OK, OK]
    slices = [call for call in engine.calls if "closed" not in call]
    assert slices == ["a0", "b0", "c0", "a1", "c1", "a2"]


async def test_a_training_clients_own_jobs_run_one_after_the_other(
    scheduler: Scheduler, engine: _Recorder, gate: _Gate
) -> None:
    _submit(scheduler, "a", lambda: engine.slices("first", 2))
    last = _submit(scheduler, "a", lambda: engine.slices("second", 2))

    gate.open()
    await _outcome(last)

    assert engine.calls == [
        *("first0", "first1", "first closed", "second0", "second1", "second closed")
    ]


async def test_training_and_sampling_have_the_engine_half_of_the_time_each(
    scheduler: Scheduler, engine: _Recorder, gate: _Gate
) -> None:
    trained = _submit(scheduler, "a", lambda: engine.slices("a", 3))
    sampled = _sample(scheduler, "s", 12)  # 12 tokens of 0.25 s, 3 slices of 1 s

    gate.open()
    assert [await _outcome(trained), await _outcome(sampled)] == [OK, OK]

    calls = [call for call in engine.calls if "closed" not in call]
    assert calls[:10] == ["a0", *["token"] * 4, "a1", *["token"] * 4]
    assert calls.count("token") == 12


async def test_a_new_slice_does_not_pay_for_the_time_in_which_the_others_had_no_work(
    scheduler: Scheduler, engine: _Recorder, gate: _Gate
) -> None:
    alone = _submit(scheduler, "a", lambda: engine.slices("alone", 8))
    gate.open()
    await _outcome(alone)
    engine.calls.clear()
    second = _Gate()
    _submit(scheduler, "gate", second.work)
    await second.reached()

    _sample(scheduler, "s", 20)
    trained = _submit(scheduler, "a", lambda: engine.slices("a", 2))
    second.open()
    await _outcome(trained)

    assert engine.calls[:6] == ["a0", *["token"] * 4, "a1"]


async def test_requests_for_samples_join_those_under_way(
    scheduler: Scheduler, engine: _Recorder, gate: _Gate
) -> None:
    samples = [_sample(scheduler, f"s{number}", 5) for number in range(16)]

    gate.open()

    assert [await _outcome(sample) for sample in samples] == [OK] * 16
    assert engine.calls == ["token"] * 5


async def test_a_job_that_is_cancelled_before_its_turn_never_runs(
    scheduler: Scheduler, engine: _Recorder, gate: _Gate
) -> None:
    cancelled = _submit(scheduler, "a", lambda: engine.slices("a", 1))
    cancelled.is_cancelled = True

    gate.open()

    assert await _outcome(cancelled) == Failure("The request was cancelled.", "user")
    assert engine.calls == []


async def test_a_job_that_is_cancelled_half_done_is_closed(
    scheduler: Scheduler, engine: _Recorder
) -> None:
    future = Future("a", "session")

    def work() -> Slices[Reply]:
        for _ in range(5):
            future.is_cancelled = True
            yield from engine.slices("a", 1)
        return OK

    scheduler.submit("a", Job(future, work))

    assert await _outcome(future) == Failure("The request was cancelled.", "user")
    assert await _outcome(_submit(scheduler, "b", lambda: OK)) == OK
    assert engine.calls == ["a0", "a closed"]


async def test_a_sample_that_is_cancelled_under_way_is_stopped(
    scheduler: Scheduler, engine: _Recorder
) -> None:
    endless = _sample(scheduler, "s", 10**9)
    assert await asyncio.to_thread(engine.drawing.wait, BOUND_S)

    endless.is_cancelled = True

    assert await _outcome(endless) == Failure("The request was cancelled.", "user")
    assert await _outcome(_submit(scheduler, "a", lambda: OK)) == OK
    assert "stop s" in engine.calls
    assert engine.left == {}
    assert scheduler.load.samples == 0


async def test_a_sample_that_is_cancelled_before_it_begins_is_settled(
    scheduler: Scheduler, engine: _Recorder, gate: _Gate
) -> None:
    cancelled = _sample(scheduler, "s", 3)
    cancelled.is_cancelled = True

    gate.open()

    assert await _outcome(cancelled) == Failure("The request was cancelled.", "user")
    assert engine.calls == []


async def test_a_request_that_cannot_be_read_fails_alone(scheduler: Scheduler) -> None:
    def unreadable() -> Sample:
        raise UserInputError("Wrong.", "Correct it.")

    wrong = Future("wrong", "session")
    scheduler.sample(SampleJob(wrong, unreadable, lambda _: OK))

    assert await _outcome(wrong) == Failure("Wrong. Correct it.", "user")
    assert await _outcome(_sample(scheduler, "s", 2)) == OK


async def test_a_fault_of_the_engine_while_it_trains_is_the_servers_and_ends_nobody_else(
    scheduler: Scheduler, engine: _Recorder
) -> None:
    def broken() -> Slices[Reply]:
        yield
        raise RuntimeError("out of memory")

    fault = await _outcome(_submit(scheduler, "a", broken))

    assert fault == Failure("tinker-local failed: RuntimeError: out of memory", "server")
    assert await _outcome(_submit(scheduler, "a", lambda: engine.slices("a", 2))) == OK


async def test_a_fault_of_the_engine_while_it_samples_fails_those_under_way_alone(
    scheduler: Scheduler, engine: _Recorder
) -> None:
    engine.fault = RuntimeError("out of memory")

    fault = await _outcome(_sample(scheduler, "s", 2))

    assert fault == Failure("tinker-local failed: RuntimeError: out of memory", "server")
    assert await _outcome(_sample(scheduler, "t", 2)) == OK


async def test_a_result_that_cannot_be_encoded_fails_alone(scheduler: Scheduler) -> None:
    def broken(_: SampleOutput) -> Reply:
        raise ValueError("no such dtype")

    fault = await _outcome(_sample(scheduler, "s", 1, broken))

    assert fault == Failure("tinker-local failed: ValueError: no such dtype", "server")
    assert await _outcome(_sample(scheduler, "t", 1)) == OK


async def test_the_end_of_a_session_closes_its_half_done_forward_backward(
    scheduler: Scheduler, engine: _Recorder, tmp_path: Path
) -> None:
    backend = Backend(engine, Catalog(tmp_path), scheduler)  # type: ignore[arg-type]
    session = backend.sessions.open(None)
    model_id = f"{session.session_id}:train:0"
    gate = _Gate()

    def work() -> Slices[Reply]:
        slices = engine.slices("a", 5)
        try:
            for _ in slices:
                gate.work()
                yield
        finally:
            slices.close()
        return OK

    future = backend.promise_model(model_id, work)
    await gate.reached()
    backend.finish_session(session.session_id)
    gate.open()

    failed = await _outcome(future)
    assert isinstance(failed, Failure)
    assert "session was finished" in failed.error
    assert await _outcome(_submit(scheduler, "other", lambda: OK)) == OK
    assert engine.calls == ["a0", "a closed"]


async def test_the_load_tells_what_waits_and_what_is_drawn(
    scheduler: Scheduler, engine: _Recorder, gate: _Gate
) -> None:
    jobs = [_submit(scheduler, "a", lambda: engine.slices("a", 1)) for _ in range(3)]
    sample = _sample(scheduler, "s", 10**9)
    second = _Gate()
    _submit(scheduler, "b", second.work)

    gate.open()
    await second.reached()

    # The first of the three is half done; the lane that has its turn is not told.
    assert scheduler.load == Load(training={"a": 3}, samples=1)
    second.open()
    for job in jobs:
        await _outcome(job)
    sample.is_cancelled = True
    await _outcome(sample)
    assert scheduler.load == Load(training={}, samples=0)
