"""How likely a given text is, under a client, a checkpoint or a base model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from agents import CONVERSATIONS, TINY, in_memory

from tinker_mcp.settings import Settings

QUESTION = [{"role": "user", "content": "Say red."}]


async def test_every_byte_but_the_first_of_a_text_is_scored(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        scored = await agent.call("compute_logprobs", base_model=TINY, text="red")
    assert scored["tokens"] == 2
    assert [token["position"] for token in scored["least_likely"]] in ([1, 2], [2, 1])
    assert scored["sum"] == pytest.approx(2 * scored["mean"], rel=1e-4)
    assert scored["perplexity"] == pytest.approx(math.exp(-scored["mean"]), rel=1e-4)


async def test_only_the_completion_counts_where_one_is_given(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        whole = await agent.call("compute_logprobs", base_model=TINY, text="Say red")
        part = await agent.call("compute_logprobs", base_model=TINY, text="Say", completion=" red")
    assert (whole["tokens"], part["tokens"]) == (6, 4)
    last = {token["position"]: token["logprob"] for token in whole["least_likely"]}
    assert part["sum"] == pytest.approx(sum(last[at] for at in (3, 4, 5, 6)), rel=1e-3)


async def test_a_completion_after_messages_is_the_assistants_last_message(
    settings: Settings,
) -> None:
    said = {"role": "assistant", "content": "red!"}
    async with in_memory(settings) as agent:
        asked: dict[str, Any] = {"base_model": TINY}
        given = await agent.call("compute_logprobs", **asked, messages=QUESTION, completion="red!")
        spoken = await agent.call("compute_logprobs", **asked, messages=[*QUESTION, said])
    assert given["sum"] == spoken["sum"]
    assert given["renderer"] is not None


async def test_it_equals_the_trainers_loss_and_rises_with_training(settings: Settings) -> None:
    one = CONVERSATIONS[:1]
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        data_id = (await agent.new_data(conversations=one))["data_id"]
        asked: dict[str, Any] = {"client_id": client_id, "messages": one[0]["messages"]}
        before = await agent.call("compute_logprobs", **asked)
        loss = await agent.loss(client_id, data_id)
        await agent.train(client_id, data_id, batch_size=1)
        after = await agent.call("compute_logprobs", **asked)
    assert -before["mean"] == pytest.approx(loss, rel=1e-3)
    assert after["sum"] > before["sum"]
    assert after["weights"] == f"{client_id} at step 3"


async def test_a_long_text_shows_its_60_least_likely_tokens(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        scored = await agent.call("compute_logprobs", base_model=TINY, text="a long text " * 50)
    shown = [token["logprob"] for token in scored["least_likely"]]
    assert (scored["tokens"], len(shown)) == (599, 60)
    assert shown == sorted(shown)
    assert len(agent.texts[-1]) < 16_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"text": "x", "base_model": TINY}, "There is no token to score"),
        ({"messages": QUESTION, "base_model": TINY}, "There is no token to score"),
        ({"text": "xy", "messages": QUESTION, "base_model": TINY}, "either text or messages"),
        ({"text": "xy"}, "compute_logprobs got nothing to sample from"),
        ({"text": "xy", "client_id": "client-9"}, "No training client 'client-9'"),
    ],
)
async def test_what_cannot_be_scored_is_told(
    settings: Settings, arguments: dict[str, Any], said: str
) -> None:
    async with in_memory(settings) as agent:
        assert said in await agent.error("compute_logprobs", **arguments)
