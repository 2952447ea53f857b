from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinker_local.errors import UserInputError
from tinker_local.ops import LoraSpec
from tinker_local.service import futures as futures_module
from tinker_local.service.backend import Backend
from tinker_local.service.checkpoints import Catalog
from tinker_local.service.futures import Failure, Future, FutureStore, Reply
from tinker_local.service.scheduler import Scheduler, Sequencer
from tinker_local.service.sessions import TrainedModel

BOUND_S = 5.0
OK = Reply(b"{}", "application/json")


class _Engine:
    """An engine of which only the end of a client matters here."""

    def __init__(self) -> None:
        self.dropped: list[tuple[str, str]] = []

    def drop_model(self, model_id: str) -> None:
        self.dropped.append((model_id, threading.current_thread().name))


@pytest.fixture
async def backend(tmp_path: Path) -> Backend:
    engine: Any = _Engine()
    return Backend(engine, Catalog(tmp_path), Scheduler(engine))


def _client(backend: Backend, gap_s: float = BOUND_S) -> str:
    """An open training client's id."""
    session = backend.sessions.open(None)
    model_id = f"{session.session_id}:train:0"
    session.models[model_id] = _trained(backend, model_id, gap_s)
    return model_id


def _trained(backend: Backend, model_id: str, gap_s: float = BOUND_S) -> TrainedModel:
    sequencer = Sequencer(backend.scheduler, model_id, gap_s=gap_s)
    model = TrainedModel(model_id, model_id.partition(":")[0], "org/base", LoraSpec(), sequencer)
    sequencer.on_gap = model.note_gap
    return model


async def _outcome(future: Future) -> Reply | Failure:
    outcome = await future.wait(BOUND_S)
    assert outcome is not None
    return outcome


async def test_requests_that_arrive_out_of_order_run_in_order(backend: Backend) -> None:
    model_id, ran = _client(backend), list[int]()

    def work(number: int) -> Reply:
        ran.append(number)
        return OK

    promised = [backend.promise_in_order(model_id, n, lambda n=n: work(n)) for n in (3, 2, 5, 1, 4)]

    for future in promised:
        assert await _outcome(future) == OK
    assert ran == [1, 2, 3, 4, 5]


async def test_a_request_waits_for_the_numbers_before_it(backend: Backend) -> None:
    model_id = _client(backend)

    second = backend.promise_in_order(model_id, 2, lambda: OK)
    other = backend.promise_in_order(_client(backend), 1, lambda: OK)

    assert await _outcome(other) == OK  # the engine's thread is free meanwhile
    assert second.outcome is None
    backend.promise_in_order(model_id, 1, lambda: OK)
    assert await _outcome(second) == OK


async def test_a_request_that_fails_uses_its_number_up(backend: Backend) -> None:
    model_id = _client(backend)

    def fail() -> Reply:
        raise UserInputError("Wrong.", "Correct it.")

    first = backend.promise_in_order(model_id, 1, fail)
    second = backend.promise_in_order(model_id, 2, lambda: OK)

    assert await _outcome(first) == Failure("Wrong. Correct it.", "user")
    assert await _outcome(second) == OK


async def test_an_unforeseen_error_is_the_servers_and_ends_no_other_request(
    backend: Backend,
) -> None:
    broken = backend.promise_model("s:train:0", lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    after = backend.promise_model("s:train:1", lambda: OK)

    failure = await _outcome(broken)
    assert isinstance(failure, Failure)
    assert failure.category == "server"
    assert "ZeroDivisionError" in failure.error
    assert await _outcome(after) == OK


async def test_a_resubmitted_request_meets_its_own_future_and_runs_once(backend: Backend) -> None:
    model_id, runs = _client(backend), list[str]()

    def work() -> Reply:
        runs.append("once")
        return OK

    first = backend.promise_in_order(model_id, 1, work)
    pending = backend.promise_in_order(model_id, 1, work)
    await _outcome(first)
    finished = backend.promise_in_order(model_id, 1, work)
    await _outcome(backend.promise_in_order(model_id, 2, lambda: OK))

    assert first is pending is finished
    assert runs == ["once"]


async def test_a_number_that_never_comes_is_given_up_and_noted(backend: Backend) -> None:
    model_id = _client(backend, gap_s=0.01)
    model = backend.sessions.model(model_id)

    async with asyncio.timeout(BOUND_S):
        outcome = await _outcome(backend.promise_in_order(model_id, 2, lambda: OK))

    assert outcome == OK
    assert model.failed_backward == "request 1 of this client never reached the server"


async def test_every_gap_is_given_up(backend: Backend) -> None:
    model_id = _client(backend, gap_s=0.01)

    promised = [backend.promise_in_order(model_id, seq_id, lambda: OK) for seq_id in (2, 4, 7)]

    assert [await _outcome(future) for future in promised] == [OK, OK, OK]


async def test_a_gap_is_noted_in_its_turn_and_not_before(backend: Backend) -> None:
    model_id = _client(backend, gap_s=0.01)
    model = backend.sessions.model(model_id)
    is_given_up = threading.Event()
    seen: dict[int, bool] = {}

    def work(number: int) -> Reply:
        if number == 1:  # the engine is busy while the event loop gives the 2 up
            assert is_given_up.wait(BOUND_S)
        seen[number] = model.failed_backward is not None
        return OK

    for number in (1, 3):
        backend.promise_in_order(model_id, number, lambda n=number: work(n))
    asyncio.get_running_loop().call_later(0.1, is_given_up.set)  # after the gap's 0.01 s
    await _outcome(backend.promise_in_order(model_id, 4, lambda: OK))

    assert seen == {1: False, 3: True}


async def test_a_number_that_comes_after_it_was_given_up_fails(backend: Backend) -> None:
    model_id = _client(backend, gap_s=0.01)
    await _outcome(backend.promise_in_order(model_id, 2, lambda: OK))

    late = await _outcome(backend.promise_in_order(model_id, 1, lambda: OK))

    assert isinstance(late, Failure)
    assert "seq_id 1" in late.error


async def test_a_number_that_comes_in_time_is_not_given_up(backend: Backend) -> None:
    model_id = _client(backend, gap_s=0.05)
    second = backend.promise_in_order(model_id, 2, lambda: OK)
    backend.promise_in_order(model_id, 1, lambda: OK)
    await _outcome(second)

    await asyncio.sleep(0.1)  # past the time at which the 1 would have been given up

    assert backend.sessions.model(model_id).failed_backward is None
    assert await _outcome(backend.promise_in_order(model_id, 3, lambda: OK)) == OK


@pytest.mark.parametrize("seq_id", [0, -1])
async def test_a_number_that_can_never_come_up_fails_at_once(backend: Backend, seq_id: int) -> None:
    failure = await _outcome(backend.promise_in_order(_client(backend), seq_id, lambda: OK))

    assert isinstance(failure, Failure)
    assert f"seq_id {seq_id}" in failure.error


async def test_a_request_of_an_unknown_client_is_promised_a_failure(backend: Backend) -> None:
    failure = await _outcome(backend.promise_in_order("lost:train:0", 7, lambda: OK))

    assert isinstance(failure, Failure)
    assert "There never was a session 'lost'" in failure.error


async def test_several_waiters_get_the_same_outcome() -> None:
    future = Future("a", "session")
    waiters = [asyncio.create_task(future.wait(BOUND_S)) for _ in range(3)]

    future.resolve(OK)

    assert await asyncio.gather(*waiters) == [OK, OK, OK]


async def test_a_wait_ends_without_an_outcome_after_its_time() -> None:
    assert await Future("a", "session").wait(0.01) is None


async def test_a_waiter_that_gives_up_leaves_the_future_to_others() -> None:
    future = Future("a", "session")
    lost = asyncio.create_task(future.wait(BOUND_S))
    await asyncio.sleep(0)
    lost.cancel()

    future.resolve(OK)

    assert await future.wait(BOUND_S) == OK


async def test_the_first_outcome_stays() -> None:
    future = Future("a", "session")

    future.resolve(OK)
    future.resolve(Failure("late", "server"))

    assert future.outcome == OK


@pytest.fixture
def store_that_forgets(monkeypatch: pytest.MonkeyPatch) -> Iterator[FutureStore]:
    monkeypatch.setattr(futures_module, "KEEP_S", -1.0)
    yield FutureStore()


async def test_finished_results_are_forgotten_in_time_and_pending_ones_never(
    store_that_forgets: FutureStore,
) -> None:
    finished = store_that_forgets.create("finished", "session")
    store_that_forgets.create("pending", "session")
    finished.resolve(OK)

    store_that_forgets.create("next", "session")

    assert store_that_forgets.get("finished") is None
    assert store_that_forgets.get("pending") is not None


async def test_finishing_a_session_frees_its_clients_on_the_engines_thread(
    backend: Backend,
) -> None:
    model_id = _client(backend)

    backend.finish_session(model_id.partition(":")[0])
    await _outcome(backend.promise_model("another:train:0", lambda: OK))

    engine: Any = backend.engine
    assert engine.dropped == [(model_id, "engine")]


async def test_finishing_a_session_fails_what_waits(backend: Backend) -> None:
    model_id = _client(backend)
    waiting = backend.promise_in_order(model_id, 2, lambda: OK)

    backend.finish_session(model_id.partition(":")[0])

    failure = await _outcome(waiting)
    assert isinstance(failure, Failure)
    assert "session was finished" in failure.error


async def test_a_client_that_is_being_made_while_its_session_ends_is_freed(
    backend: Backend,
) -> None:
    session = backend.sessions.open(None)
    model_id = f"{session.session_id}:train:0"
    is_running, may_end = threading.Event(), threading.Event()

    def create() -> Reply:
        is_running.set()
        assert may_end.wait(BOUND_S)
        session.models[model_id] = _trained(backend, model_id)
        return OK

    backend.promise_model(model_id, create)
    assert await asyncio.to_thread(is_running.wait, BOUND_S)

    backend.finish_session(session.session_id)
    may_end.set()
    await _outcome(backend.promise_model("another:train:0", lambda: OK))

    engine: Any = backend.engine
    assert [model for model, _ in engine.dropped] == [model_id]


async def test_finishing_a_finished_session_changes_nothing(backend: Backend) -> None:
    session_id = backend.sessions.open(None).session_id
    backend.finish_session(session_id)

    backend.finish_session(session_id)

    with pytest.raises(UserInputError, match="is finished"):
        backend.sessions.get(session_id)
