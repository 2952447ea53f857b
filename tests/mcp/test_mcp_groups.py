"""Several samples are a group: their tokens stay here, the agent sees text."""

from __future__ import annotations

from typing import Any

import pytest
from agents import TINY, in_memory
from tinker_cookbook.renderers import ToolCall

from tinker_mcp.settings import Settings
from tinker_mcp.training.sampling import in_words

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Say red."}], "max_tokens": 8}


async def test_several_samples_are_a_group_and_one_is_none(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        one = await agent.call("sample", base_model=TINY, **ASK)
        several = await agent.call("sample", base_model=TINY, **ASK, num_samples=3)
        more = await agent.call("sample", base_model=TINY, **ASK, num_samples=2)
    assert one["group_id"] is None
    assert (several["group_id"], more["group_id"]) == ("group-1", "group-2")
    assert [sample["index"] for sample in several["samples"]] == [0, 1, 2]


async def test_the_reply_to_a_group_holds_no_tokens(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        several = await agent.call("sample", base_model=TINY, **ASK, num_samples=2)
    assert set(several["samples"][0]) == {
        "index",
        "text",
        "message",
        "is_complete",
        "stop_reason",
        "tokens",
        "mean_logprob",
        "is_cut",
    }
    assert several["samples"][0]["tokens"] <= 8  # a count
    assert several["samples"][0]["message"] is None  # plain text says it all


async def test_a_client_sampled_between_two_steps_sees_the_first(settings: Settings) -> None:
    import asyncio

    async with in_memory(settings) as agent:
        client_id, data_id = await agent.new_client(), (await agent.new_data())["data_id"]
        step: dict[str, Any] = {
            "client_id": client_id,
            "data_id": data_id,
            "optim": {"learning_rate": 1e-3},
        }
        _, drawn, _ = await asyncio.gather(
            agent.call("forward_backward", **step),
            agent.call("sample", client_id=client_id, **ASK),
            agent.call("forward_backward", **step),
        )
    assert drawn["weights"] == f"{client_id} at step 1"


def test_a_message_says_more_than_its_text_where_it_thinks_or_calls() -> None:
    call = ToolCall.model_validate(
        {"id": "1", "function": {"name": "look_up", "arguments": '{"what": "weather"}'}}
    )
    thinking = {"type": "thinking", "thinking": "Hm."}
    text = {"type": "text", "text": "Red."}
    plain, nothing = in_words({"role": "assistant", "content": "Red."})
    _, thought = in_words({"role": "assistant", "content": [thinking, text]})  # type: ignore[list-item]  # made plain to be read
    _, called = in_words({"role": "assistant", "content": "", "tool_calls": [call]})
    assert (plain, nothing) == ("Red.", None)
    assert thought == {"role": "assistant", "content": [thinking, text]}
    assert called is not None
    assert called["tool_calls"][0]["function"]["name"] == "look_up"


@pytest.mark.parametrize("wrong", [{"num_samples": True}, {"temperature": True}, {"max_tokens": 0}])
async def test_numbers_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    async with in_memory(Settings()) as agent:
        said = await agent.error("sample", base_model=TINY, prompt="x", **wrong)
    assert said.startswith(f"invalid_input: sample: {next(iter(wrong))}=")
