"""What is in flight: how deep, in which order it is recorded, and what a run's shape costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from attempts import Run, backend_of, held_out_sentences, pairs, sentences, spec_of

from servers import LocalServer, start_server
from tinker_mcp.errors import ClientLostError, RequestFailedError
from tinker_mcp.runs.pipeline import UNRECORDED, Pipeline
from tinker_mcp.training.loop import batch_of
from tiny_data import TINY

BOUND_S = 10.0
ANSWER_S = 30.0
CYCLE_S = 0.5


async def wait(tasks: set[asyncio.Task[Any]]) -> None:
    async with asyncio.timeout(BOUND_S):
        await asyncio.wait(tasks)


class Requests:
    """Requests that are answered when the test says so."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._answers: dict[str, asyncio.Future[str]] = {}
        self.recorded: list[str] = []

    def put(self, name: str, *, is_step: bool) -> None:
        answer = self._answers[name] = asyncio.get_running_loop().create_future()

        async def request() -> str:
            return await answer

        self._pipeline.put(request(), record=self.recorded.append, is_step=is_step)

    def answer(self, *names: str) -> None:
        for name in names:
            self._answers[name].set_result(name)

    def fail(self, name: str, error: Exception) -> None:
        self._answers[name].set_exception(error)

    def cancel(self, name: str) -> None:
        self._answers[name].cancel()


async def is_waiting(task: asyncio.Task[None]) -> bool:
    """Whether it still waits when all else that could run has run."""
    for _ in range(10):
        await asyncio.sleep(0)
    return not task.done()


async def test_two_steps_are_in_flight_and_the_third_waits_for_the_first() -> None:
    async with Pipeline(wait) as pipeline:
        requests = Requests(pipeline)
        requests.put("step 1", is_step=True)
        await pipeline.room()
        requests.put("step 2", is_step=True)
        waiting = asyncio.create_task(pipeline.room())
        assert await is_waiting(waiting)
        requests.answer("step 1")
        await waiting
        assert requests.recorded == ["step 1"]


async def test_what_is_answered_early_is_recorded_in_its_turn() -> None:
    async with Pipeline(wait) as pipeline:
        requests = Requests(pipeline)
        for name in ("step 1", "step 2"):
            requests.put(name, is_step=True)
        draining = asyncio.create_task(pipeline.drain())
        requests.answer("step 2")
        assert await is_waiting(draining)
        assert requests.recorded == []
        requests.answer("step 1")
        await draining
        assert requests.recorded == ["step 1", "step 2"]


async def test_a_slow_checkpoint_holds_back_no_step_until_many_are_unrecorded() -> None:
    async with Pipeline(wait) as pipeline:
        requests = Requests(pipeline)
        requests.put("checkpoint", is_step=False)
        steps = [f"step {number}" for number in range(1, UNRECORDED)]
        for name in steps:
            async with asyncio.timeout(BOUND_S):
                await pipeline.room()
            requests.put(name, is_step=True)
            requests.answer(name)
        waiting = asyncio.create_task(pipeline.room())
        assert await is_waiting(waiting)
        assert requests.recorded == []
        requests.answer("checkpoint")
        await waiting
        assert requests.recorded == ["checkpoint", *steps]


async def test_a_failure_is_raised_when_those_behind_it_have_ended_and_they_are_not_recorded() -> (
    None
):
    async with Pipeline(wait) as pipeline:
        requests = Requests(pipeline)
        for name in ("step 1", "step 2", "step 3"):
            requests.put(name, is_step=True)
        failing = asyncio.create_task(pipeline.drain())
        requests.answer("step 1")
        requests.fail("step 2", RequestFailedError("No.", next_step=""))
        assert await is_waiting(failing)
        requests.answer("step 3")
        with pytest.raises(RequestFailedError):
            await failing
        assert requests.recorded == ["step 1"]


async def test_a_request_that_the_sdk_gave_up_is_a_lost_client() -> None:
    async with Pipeline(wait) as pipeline:
        requests = Requests(pipeline)
        requests.put("step 1", is_step=True)
        requests.cancel("step 1")
        with pytest.raises(ClientLostError):
            await pipeline.drain()


async def test_no_task_is_pending_when_the_block_ends() -> None:
    before = asyncio.all_tasks()
    async with Pipeline(wait) as pipeline:
        requests = Requests(pipeline)
        requests.put("step 1", is_step=True)
        assert asyncio.all_tasks() != before
    assert asyncio.all_tasks() == before


@pytest.fixture(scope="module")
def clocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server that picks work up once in CYCLE_S, as the hosted service does in ten seconds."""
    import tinker

    server = start_server(tmp_path_factory.mktemp("clocked") / "state", "--cycle-s", str(CYCLE_S))
    # The model is loaded for its first client, which can take longer than a cycle.
    with tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key) as service:
        service.create_lora_training_client(TINY, rank=4).result(ANSWER_S)
    yield server
    server.stop()


def stats(server: LocalServer) -> dict[str, Any]:
    answer = httpx.get(f"{server.base_url}/stats", headers={"X-API-Key": server.api_key})
    told: dict[str, Any] = answer.raise_for_status().json()
    return told


def cycles(server: LocalServer, model: str) -> int:
    """Between a training client's first cycle with work and its last, both counted."""
    told = stats(server)["cycles_by_training_client"][model]
    return int(told["used"] + told["wasted"])


def model_of(run: Run) -> str:
    return run.checkpoints()[-1].state_path.removeprefix("tinker://").split("/")[0]


async def test_thirty_steps_with_evaluations_and_checkpoints_take_thirty_one_cycles(
    clocked: LocalServer, tmp_path: Path
) -> None:
    train, held_out = sentences(), held_out_sentences()
    spec = spec_of(train, held_out, steps=30, eval_every=5, save_every=5, learning_rate=1e-3)
    run = Run(tmp_path, spec, train, held_out)
    outcome = await run.attempt(backend_of(clocked))
    assert outcome.state == "completed"
    assert len(run.checkpoints()) == 6
    assert len(run.series("eval", "test/nll")) == 7
    # One more for the last evaluation and checkpoint, and one in which the client was made.
    assert cycles(clocked, model_of(run)) <= 30 + 1 + 1


async def test_a_loop_that_waits_for_each_answer_takes_twice_as_many(
    clocked: LocalServer,
) -> None:
    import tinker

    def train(steps: int) -> str:
        with tinker.ServiceClient(base_url=clocked.base_url, api_key=clocked.api_key) as service:
            client = service.create_lora_training_client(TINY, rank=4, seed=0).result(ANSWER_S)
            for step in range(steps):
                batch = batch_of(sentences(), 2, step, 0)
                client.forward_backward(batch, "cross_entropy").result(ANSWER_S)
                client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result(ANSWER_S)
            return client.model_id

    model = await asyncio.to_thread(train, 10)
    assert cycles(clocked, model) >= 20


async def test_a_dpo_step_takes_two_cycles_since_its_loss_needs_the_first_ones_answer(
    clocked: LocalServer, tmp_path: Path
) -> None:
    train = pairs()
    run = Run(tmp_path, spec_of(train, method="dpo", steps=10, learning_rate=1e-3), train)
    await run.attempt(backend_of(clocked))
    # One for the references, one for the last checkpoint, and one in which the client was made.
    assert cycles(clocked, model_of(run)) <= 2 * 10 + 3


async def test_two_steps_wait_at_the_backend_while_a_run_trains(
    clocked: LocalServer, tmp_path: Path
) -> None:
    train = sentences()
    run = Run(tmp_path, spec_of(train, steps=8), train)
    attempt = asyncio.create_task(run.attempt(backend_of(clocked)))
    most = 0
    deadline = time.monotonic() + ANSWER_S
    while not attempt.done():
        assert time.monotonic() < deadline
        queued = (await asyncio.to_thread(stats, clocked))["queued_training_requests"]
        most = max([most, *queued.values()])
    await attempt
    assert most == 4  # a forward_backward and an optim_step of each


async def test_a_failed_step_ends_the_attempt_and_nothing_behind_it_is_recorded(
    tiny_server: LocalServer, tmp_path: Path
) -> None:
    import tinker

    order = batch_of(range(8), 8, 0, 0)
    train = sentences()
    outside = train[order[2]].model_input.to_ints()
    outside[-1] = 300  # no token of the tiny model
    train[order[2]] = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(outside),
        loss_fn_inputs=train[order[2]].loss_fn_inputs,
    )
    run = Run(tmp_path, spec_of(train, batch_size=1, steps=8, save_every=1), train)
    with pytest.raises(RequestFailedError, match="token id 300"):
        await run.attempt(backend_of(tiny_server))
    assert len(run.losses()) == 2
    assert max(row.step for row in run.checkpoints()) <= 2
