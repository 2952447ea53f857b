"""Preference pairs through a custom loss, against the client's frozen start."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from agents import TINY, Agent, in_memory

from tinker_mcp.settings import Settings

PAIRS = [
    {"prompt": f"Say {word}.", "chosen": f"{word}!", "rejected": "No, never."}
    for word in ("red", "green", "blue", "gold")
]


async def pair_data(agent: Agent) -> str:
    built = await agent.call(
        "build_datums",
        base_model=TINY,
        conversations=PAIRS,
        kind="preference",
        train_on_what="last_assistant_message",
    )
    assert built["datums"] in (4, 8)
    return str(built["data_id"])


async def test_the_loss_at_step_0_is_ln_2_and_falls_with_training(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id, data_id = await agent.new_client(), await pair_data(agent)
        on: dict[str, Any] = {"client_id": client_id, "data_id": data_id, "loss_fn": "dpo"}
        before = await agent.call("forward_backward", **on, forward_only=True)
        first = await agent.call("forward_backward", **on, optim={"learning_rate": 1e-2})
        after = await agent.call("forward_backward", **on, forward_only=True)
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert set(before["metrics"]) == {"accuracy", "margin", "chosen_reward", "rejected_reward"}
    assert before["metrics"]["margin"] == pytest.approx(0, abs=1e-3)
    assert after["loss"] < before["loss"]
    assert after["metrics"]["margin"] > 0
    margin = after["metrics"]["chosen_reward"] - after["metrics"]["rejected_reward"]
    assert after["metrics"]["margin"] == pytest.approx(margin, abs=1e-4)


async def test_train_takes_pairs_and_tells_how_many_are_in_order(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id, data_id = await agent.new_client(), await pair_data(agent)
        plan = {"steps": 6, "batch_size": 4, "loss_fn": "dpo", "loss_fn_config": {"beta": 0.2}}
        trained = await agent.train(client_id, data_id, **plan)
    assert trained["finished"]
    assert trained["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert trained["last_loss"] < trained["first_loss"]
    assert trained["last_metrics"]["accuracy"] == 1


async def test_a_client_from_a_checkpoint_is_compared_with_that_checkpoint(
    settings: Settings,
) -> None:
    async with in_memory(settings) as agent:
        trained, data_id = await agent.new_client(), await pair_data(agent)
        on: dict[str, Any] = {"data_id": data_id, "loss_fn": "dpo"}
        await agent.call("forward_backward", **on, client_id=trained, optim={"learning_rate": 1e-2})
        saved = await agent.call("save_checkpoint", client_id=trained, name="start")
        opened = await agent.call("create_training_client", checkpoint=saved["state"])
        scored = await agent.call(
            "forward_backward", **on, client_id=opened["client_id"], forward_only=True
        )
    assert scored["loss"] == pytest.approx(math.log(2), abs=1e-4)


async def test_what_would_tear_a_pair_apart_is_refused(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id, data_id = await agent.new_client(), await pair_data(agent)
        on: dict[str, Any] = {"client_id": client_id, "data_id": data_id, "loss_fn": "dpo"}
        said = [
            await agent.error("forward_backward", **on, offset=1),
            await agent.error("forward_backward", **on, limit=3),
            await agent.error("train", **on, steps=1, batch_size=3, learning_rate=1e-3),
        ]
        part = await agent.call("forward_backward", **on, offset=2, limit=2, forward_only=True)
    assert ["Use an even offset" in said[0], "tear apart" in said[1]] == [True, True]
    assert "batch_size 3 is odd" in said[2]
    assert part["datums"] == 2


async def test_a_cancelled_call_does_not_poison_the_client(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id, data_id = await agent.new_client(), await pair_data(agent)
        on: dict[str, Any] = {"client_id": client_id, "data_id": data_id, "loss_fn": "dpo"}
        await agent.call("forward_backward", **on, forward_only=True)  # the references are there
        call = asyncio.create_task(
            agent.call("forward_backward", **on, optim={"learning_rate": 1e-3})
        )
        await asyncio.wait({call}, timeout=0.02)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        again = await agent.call("forward_backward", **on, optim={"learning_rate": 1e-3})
    assert again["is_finite"]


async def test_calls_that_come_together_with_the_first_dpo_keep_their_order(
    settings: Settings,
) -> None:
    async with in_memory(settings) as agent:
        client_id, data_id = await agent.new_client(), await pair_data(agent)
        on: dict[str, Any] = {"client_id": client_id, "data_id": data_id, "loss_fn": "dpo"}
        stepping, scoring = await asyncio.gather(
            agent.call("forward_backward", **on, optim={"learning_rate": 1e-2}),
            agent.call("forward_backward", **on, forward_only=True),
        )
    assert stepping["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert scoring["loss"] < stepping["loss"]  # it arrived second and saw the step
