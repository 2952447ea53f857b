"""How an attempt ends before its last step: stops, the budget, a backend that is gone or silent."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attempts import LEASE, RUN_ID, Run, backend_of, held_out_sentences, pairs, sentences, spec_of

from servers import LocalServer
from tinker_mcp.errors import BackendGoneError
from tinker_mcp.runs import attempt as attempt_module
from tinker_mcp.runs.attempt import positions
from tinker_mcp.runs.journal import Journal
from tinker_mcp.runs.spec import Method
from tinker_mcp.store.rows import StopAsked
from tinker_mcp.store.runs import RunStore
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.dpo import DpoLoss

ANSWER_S = 30.0
NOTICED_S = 15.0
METHODS: tuple[Method, ...] = ("sft", "dpo")


@pytest.fixture
def backend(tiny_server: LocalServer) -> Backend:
    return backend_of(tiny_server)


def a_run(home: Path, method: Method = "sft", **changes: Any) -> Run:
    if method == "dpo":
        train, held_out = pairs(), pairs(("teal", "lime"))
    else:
        train, held_out = sentences(), held_out_sentences()
    settings = {"method": method, "beta": 0.1, **changes}
    return Run(home, spec_of(train, held_out, **settings), train, held_out)


class Telling(Journal):
    """A journal that does something when a step is recorded."""

    def __init__(self, run: Run, at_step: int, do: Callable[[Telling], None]) -> None:
        super().__init__(run.home, run.run_id, LEASE)
        self._at_step, self._do = at_step, do

    def step(self, step: int, numbers: Any) -> None:
        super().step(step, numbers)
        if step == self._at_step:
            self._do(self)


def asking(run: Run, at_step: int, how: StopAsked) -> Journal:
    """A journal whose heartbeat has just read that somebody asked to stop."""

    def ask(journal: Telling) -> None:
        journal.asked = how

    return Telling(run, at_step, ask)


@pytest.mark.parametrize("method", METHODS)
async def test_a_stop_saves_where_the_run_is_and_a_resume_goes_on_from_there(
    backend: Backend, tmp_path: Path, method: Method
) -> None:
    whole, parts = a_run(tmp_path / "whole", method), a_run(tmp_path / "parts", method)
    await whole.attempt(backend)
    outcome = await parts.attempt(backend, asking(parts, 2, "save"))
    assert (outcome.state, outcome.reason) == ("stopped", "user")
    reached = len(parts.losses())
    assert 2 <= reached <= 4  # two were in flight
    assert [(row.step, row.is_final) for row in parts.checkpoints()] == [(reached, False)]
    again = await parts.attempt(backend)
    assert again.state == "completed"
    assert parts.losses() == whole.losses()


async def test_a_stop_without_saving_leaves_no_checkpoint(backend: Backend, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    outcome = await run.attempt(backend, asking(run, 2, "drop"))
    assert (outcome.state, outcome.reason) == ("stopped", "user")
    assert 2 <= len(run.losses()) <= 4
    assert run.checkpoints() == []


async def test_a_stop_right_after_a_checkpoint_does_not_save_twice(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path, save_every=1, ttl_s=7200)
    await run.attempt(backend, asking(run, 2, "save"))
    steps = [row.step for row in run.checkpoints()]
    assert steps == list(range(1, len(run.losses()) + 1))


async def test_a_stop_before_the_first_step_trains_and_saves_nothing(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path)
    journal = run.journal()
    journal.asked = "save"
    outcome = await run.attempt(backend, journal)
    assert (outcome.state, outcome.reason) == ("stopped", "user")
    assert (run.losses(), run.checkpoints()) == ([], [])


@pytest.mark.parametrize(("method", "passes", "before"), [("sft", 1, 0), ("dpo", 2, 1)])
async def test_the_step_that_would_exceed_the_budget_is_not_submitted(
    backend: Backend, tmp_path: Path, method: Method, passes: int, before: int
) -> None:
    # A token costs $1, a step is the whole set; before the first, both sets are scored `before`
    # times for the references, and the held-out one once more.
    run = a_run(tmp_path, method, batch_size=8, usd_per_million=1e6, steps=20)
    train, held_out = positions(run.train), positions(run.held_out)
    ahead = before * (train + held_out) + held_out
    run.change(max_usd=ahead + 3 * passes * train + 0.5 * train)
    journal = run.journal()
    outcome = await run.attempt(backend, journal)
    assert (outcome.state, outcome.reason) == ("stopped", "budget")
    assert outcome.detail.startswith("Step 4 would cost $")
    assert len(run.losses()) == 3
    assert [row.step for row in run.checkpoints()] == [3]
    assert journal.spent_usd == ahead + 3 * passes * train


async def test_an_evaluation_that_the_budget_has_no_room_for_is_left_out(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path, batch_size=8, usd_per_million=1e6, steps=2)
    run.change(max_usd=positions(run.held_out) + 2 * positions(run.train))
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert list(run.series("eval", "test/nll")) == [0]
    assert run.warnings() == ["The evaluation at step 2 was left out: max_usd."]


@pytest.mark.parametrize("method", METHODS)
async def test_a_local_backend_that_dies_is_noticed_within_seconds_and_the_next_attempt_goes_on(
    backend: Backend, own_server: LocalServer, tmp_path: Path, method: Method
) -> None:
    run = a_run(tmp_path / "home", method, steps=1000, learning_rate=1e-4)
    killed_at: list[float] = []

    def kill(_: Telling) -> None:
        own_server.kill()
        killed_at.append(time.monotonic())

    with pytest.raises(BackendGoneError):
        await run.attempt(backend_of(own_server), Telling(run, 5, kill))
    assert time.monotonic() - killed_at[0] < NOTICED_S
    assert len(run.losses()) >= 5
    run.change(steps=3)
    assert (await run.attempt(backend)).state == "completed"
    assert len(run.losses()) == 3


async def test_a_silent_backend_is_waited_for_and_the_run_says_so(
    own_server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_module, "SILENCE_S", 0.5)
    run = a_run(tmp_path / "home", steps=12)

    def stop(_: Telling) -> None:
        os.kill(own_server.pid, signal.SIGSTOP)

    task = asyncio.create_task(run.attempt(backend_of(own_server), Telling(run, 3, stop)))
    try:
        await until(lambda: state_of(run) == "waiting", task)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert (await task).state == "completed"
    assert state_of(run) == "running"  # how it ended is the worker's to write
    assert len(run.losses()) == 12


async def test_the_hosted_backend_out_of_reach_is_waited_for(
    own_server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_module, "SILENCE_S", 0.5)
    hosted = Backend("hosted", own_server.base_url, own_server.api_key)
    run = a_run(tmp_path / "home", steps=1000)

    def kill(_: Telling) -> None:
        own_server.kill()

    task = asyncio.create_task(run.attempt(hosted, Telling(run, 3, kill)))
    await until(lambda: state_of(run) == "waiting", task)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def until(is_so: Callable[[], bool], task: asyncio.Task[Any]) -> None:
    deadline = time.monotonic() + ANSWER_S
    while not is_so():
        assert not task.done()
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def state_of(run: Run) -> str:
    with RunStore(run.home) as store:
        return store.get(RUN_ID).state


async def test_a_custom_loss_that_fails_poisons_its_client_and_the_next_attempt_has_another(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = a_run(tmp_path / "whole", "dpo"), a_run(tmp_path / "run", "dpo", save_every=2)
    await whole.attempt(backend)
    sound, calls = DpoLoss.function, []

    def broken(self: DpoLoss, datums: Any) -> Any:
        compute = sound(self, datums)

        def loss(data: Any, logprobs: Any) -> Any:
            calls.append(1)
            if len(calls) == 5:
                raise MemoryError("no room for the loss")
            return compute(data, logprobs)

        return loss

    with monkeypatch.context() as patch:
        patch.setattr(DpoLoss, "function", broken)
        with pytest.raises(MemoryError):
            await run.attempt(backend)
    assert 0 < len(run.losses()) < 6
    assert (await run.attempt(backend)).state == "completed"
    assert run.losses() == whole.losses()


async def test_a_resumed_run_does_not_score_its_start_again(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=2, eval_every=1)
    await run.attempt(backend)
    before = run.series("eval", "test/nll")
    journal = run.journal()
    outcome = await run.attempt(backend, journal)
    assert outcome.state == "completed"
    assert run.series("eval", "test/nll") == before
    assert outcome.detail.startswith("2 steps. The last checkpoint")


async def test_its_session_is_tagged_with_the_runs_id(
    backend: Backend, tiny_server: LocalServer, tmp_path: Path
) -> None:
    import tinker

    run = a_run(tmp_path, steps=1)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    await run.attempt(backend)
    session_id = run.checkpoints()[-1].state_path.removeprefix("tinker://").split(":")[0]
    admin = tinker.AdminClient(base_url=tiny_server.base_url, api_key=tiny_server.api_key)
    bill = await admin.get_billing_usage(hour, hour + timedelta(hours=2))
    assert bill.sessions[session_id].user_metadata == {"client": "tinker-mcp", "run_id": RUN_ID}
