"""Many steps: which datums, in which order, overlapped, and in portions."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from agents import TINY, Agent, in_memory
from hypothesis import given
from hypothesis import strategies as st

from tinker_mcp.settings import Settings
from tinker_mcp.training.backend import Backend, BackendConnector
from tinker_mcp.training.clients import OpenClient, Workspace
from tinker_mcp.training.datums import render
from tinker_mcp.training.formats import Conversation
from tinker_mcp.training.loop import TrainLoop, TrainPlan, batch_of
from tinker_mcp.training.objectives import BackendLoss
from tinker_mcp.training.order import Work, submitted_in_turn
from tinker_mcp.training.sessions import NewClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import tinker

    from tinker_mcp.training.rendering import ModelRenderer


@given(count=st.integers(1, 20), batch_size=st.integers(1, 30), seed=st.integers(0, 99))
def test_an_epoch_of_batches_sees_every_datum_equally_often(
    count: int, batch_size: int, seed: int
) -> None:
    numbers: Any = range(count)
    seen = Counter(n for step in range(count) for n in batch_of(numbers, batch_size, step, seed))
    assert seen == dict.fromkeys(range(count), batch_size)


def test_the_order_is_the_seeds_and_new_in_each_epoch() -> None:
    numbers: Any = range(32)
    first, second = (batch_of(numbers, 32, epoch, 7) for epoch in (0, 1))
    assert first == batch_of(numbers, 32, 0, 7)
    assert first != second
    assert first != batch_of(numbers, 32, 0, 8)


def test_a_batch_of_a_large_set_is_made_at_once() -> None:
    numbers: Any = range(100_000)
    began = time.monotonic()
    assert len({*batch_of(numbers, 128, 3, 0)}) == 128
    assert time.monotonic() - began < 2  # the order is made once, not once a position


class Watched:
    """A real training client, and a record of what was submitted and what was answered.

    The second optim_step is answered only once a third batch has been submitted.
    """

    def __init__(self, client: tinker.TrainingClient) -> None:
        self._client = client
        self.record: list[str] = []
        self._third_is_submitted = asyncio.Event()

    def forward_backward(self, batch: Any, loss_fn: Any, config: Any) -> Answering:
        self.record.append("forward_backward")
        if self.record.count("forward_backward") == 3:
            self._third_is_submitted.set()
        return Answering(
            self._client.forward_backward(batch, loss_fn, config), "answered", self.record
        )

    def optim_step(self, adam: Any) -> Answering:
        self.record.append("optim_step")
        is_second = self.record.count("optim_step") == 2
        until = self._third_is_submitted if is_second else None
        return Answering(self._client.optim_step(adam), "stepped", self.record, until)


class Answering:
    def __init__(
        self, future: Any, word: str, record: list[str], until: asyncio.Event | None = None
    ) -> None:
        self._future, self._word, self._record, self._until = future, word, record, until

    async def coroutine(self) -> Any:
        answer = await self._future.coroutine()
        if self._until is not None:
            await self._until.wait()
        self._record.append(self._word)
        return answer


@pytest.fixture
def tinker_client(backend: Backend) -> Iterator[tinker.TrainingClient]:
    import tinker

    with tinker.ServiceClient(base_url=backend.base_url, api_key=backend.api_key) as service:
        yield service.create_lora_training_client(base_model=TINY, rank=4, seed=0).result()


def loop_of(client: Any, tiny: ModelRenderer, steps: int) -> TrainLoop:
    import tinker

    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    datums = render([Conversation("line 1", talk)] * 4, tiny, "all_tokens", 99, "none").datums
    plan = TrainPlan("data-1", steps, 2, tinker.AdamParams(learning_rate=1e-3), "cross_entropy", 0)
    return TrainLoop(plan, datums, client, BackendLoss("cross_entropy", {}))


async def ignore(_: object) -> None:
    return None


async def test_the_next_batch_is_submitted_before_the_last_one_is_answered(
    backend: Backend, tiny: ModelRenderer, tinker_client: tinker.TrainingClient
) -> None:
    watched = Watched(tinker_client)
    loop = loop_of(watched, tiny, steps=3)
    await loop.advance(backend, time.monotonic() + 10, ignore)
    assert watched.record[:4] == ["forward_backward", "optim_step"] * 2
    assert loop.is_finished


async def test_a_step_longer_than_a_call_still_brings_the_loop_on(
    backend: Backend, tiny: ModelRenderer, tinker_client: tinker.TrainingClient
) -> None:
    loop = loop_of(tinker_client, tiny, steps=4)
    loop._seconds_a_step = 60.0  # as if a step had taken longer than a call may
    for _ in range(40):
        if loop.is_finished:
            break
        loop._seconds_a_step = 60.0
        await loop.advance(backend, time.monotonic() + 1, ignore)
    assert [result.step for result in loop.results] == [1, 2, 3, 4]


async def trained_to_the_end(agent: Agent, **arguments: Any) -> list[dict[str, Any]]:
    """Replies of one train call made again until it is finished."""
    replies = [await agent.train(**arguments)]
    while not replies[-1]["finished"]:
        replies.append(await agent.train(**arguments))
    return replies


async def test_a_train_cut_into_calls_equals_one_that_was_not(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        whole = await agent.train(await agent.new_client(), data_id, steps=40)
    short = Settings(home=settings.home, call_limit_s=0.25)
    async with in_memory(settings) as patient:  # opens what a short call has no time for
        del patient
    async with in_memory(short) as agent:
        data_id = await until_there(agent, "build_datums", "data_id")
        client_id = await until_there(agent, "create_training_client", "client_id")
        replies = await trained_to_the_end(agent, client_id=client_id, data_id=data_id, steps=40)
    assert len(replies) > 1
    assert 0 <= replies[0]["steps_done"] < 40
    assert "call train again with the same arguments" in replies[0]["next_step"]
    assert replies[-1]["client_step"] == 40
    assert replies[-1]["losses"] == whole["losses"]


async def until_there(agent: Agent, tool: str, field: str) -> str:
    ask = agent.new_data if tool == "build_datums" else agent.new_client
    for _ in range(100):
        reply: Any = await ask()
        handle = reply[field] if isinstance(reply, dict) else reply
        if handle not in (None, "None"):
            return str(handle)
    raise AssertionError(f"{tool} never finished")


async def test_other_arguments_are_another_loop(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        first = await agent.train(client_id, data_id, seed=0)
        second = await agent.train(client_id, data_id, seed=1)
    assert (first["steps_done"], second["steps_done"]) == (3, 3)
    assert (first["client_step"], second["client_step"]) == (3, 6)


async def test_a_finished_plan_is_not_trained_again(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        first = await agent.train(client_id, data_id)
        repeat = await agent.train(client_id, data_id)
        other = await agent.train(client_id, data_id, seed=1)
    assert (first["client_step"], repeat["client_step"], other["client_step"]) == (3, 3, 6)
    assert repeat["losses"] == first["losses"]
    assert "This plan was finished before; this call trained nothing" in repeat["next_step"]
    assert "another seed, such as 1" in repeat["next_step"]


async def test_calls_that_come_together_are_submitted_in_order_without_waiting(
    settings: Settings,
) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        by_turns, together = await agent.new_client(), await agent.new_client()
        calls: list[tuple[str, dict[str, Any]]] = [
            ("forward_backward", {"data_id": data_id, "optim": {"learning_rate": 1e-2}}),
            ("forward_backward", {"data_id": data_id, "limit": 2}),
            ("optim_step", {"learning_rate": 3e-3}),
            ("forward_backward", {"data_id": data_id, "forward_only": True}),
            ("forward_backward", {"data_id": data_id, "optim": {"learning_rate": 1e-3}}),
            ("forward_backward", {"data_id": data_id, "forward_only": True}),
        ]
        one_by_one = [await agent.call(tool, client_id=by_turns, **asked) for tool, asked in calls]
        at_once = await asyncio.gather(
            *(agent.call(tool, client_id=together, **asked) for tool, asked in calls)
        )
    losses = [[reply.get("loss") for reply in replies] for replies in (one_by_one, at_once)]
    assert losses[0] == losses[1]


async def test_the_second_call_is_submitted_before_the_first_is_answered(
    settings: Settings,
) -> None:
    workspace = Workspace(BackendConnector(settings))
    try:
        client = await opened(workspace)
        record: list[str] = []
        all_are_submitted, may_answer = asyncio.Event(), asyncio.Event()

        def work(name: str) -> Callable[[OpenClient], Awaitable[Work[str]]]:
            async def start() -> str:
                record.append(f"{name} submitted")
                if name == "c":
                    all_are_submitted.set()
                await may_answer.wait()
                return name

            async def prepare(client: OpenClient) -> Work[str]:
                return Work(client.unfinished, name, start)

            return prepare

        deadline = time.monotonic() + 10
        calls = [
            asyncio.create_task(
                submitted_in_turn(workspace, client.client_id, deadline, work(name))
            )
            for name in "abc"
        ]
        await asyncio.wait_for(all_are_submitted.wait(), 10)
        may_answer.set()
        assert await asyncio.gather(*calls) == ["a", "b", "c"]
        assert record == ["a submitted", "b submitted", "c submitted"]
    finally:
        await workspace.close()


async def opened(workspace: Workspace) -> OpenClient:
    for _ in range(20):
        client = await workspace.create(NewClient(TINY, None, 4, 0, True, True, True, True))
        if client is not None:
            return client
    raise AssertionError("no client was opened")


async def test_the_same_train_called_twice_at_once_takes_its_steps_once(
    settings: Settings,
) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        calls = [agent.train(client_id, data_id, steps=20) for _ in "ab"]
        replies = await asyncio.gather(*calls)
    assert [reply["client_step"] for reply in replies] == [20, 20]
    assert replies[0]["losses"] == replies[1]["losses"]


async def test_a_failing_step_leaves_the_client_usable(
    backend: Backend, tiny: ModelRenderer, tinker_client: tinker.TrainingClient
) -> None:
    import tinker

    outside = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([97, 300]),
        loss_fn_inputs={"target_tokens": [98, 99], "weights": [1.0, 1.0]},
    )
    failing, good = loop_of(tinker_client, tiny, steps=2), loop_of(tinker_client, tiny, steps=2)
    failing.datums = [outside] * 4
    with pytest.raises(tinker.RequestFailedError, match="token id 300"):
        await failing.advance(backend, time.monotonic() + 30, ignore)
    await good.advance(backend, time.monotonic() + 30, ignore)
    assert good.is_finished


async def test_a_reply_to_unfinished_work_names_the_backend(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        await agent.call("list_models")  # the backend runs
    hurried = dataclasses.replace(settings, call_limit_s=0.01)
    async with in_memory(hurried) as agent:
        asked = {"base_model": TINY, "prompt": "x", "max_tokens": 4000, "stop": ["never"]}
        reply = await agent.call("sample", **asked)
    assert not reply["finished"]
    assert reply["backend"].startswith("local (127.0.0.1:")
    assert reply["weights"] == f"{TINY}, untrained"
