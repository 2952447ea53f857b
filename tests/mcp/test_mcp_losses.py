"""The contract of each loss: what fits goes through, what does not is refused before it is sent."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from agents import Agent, in_memory

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.settings import Settings
from tinker_mcp.training.losses import CONTRACTS, LossName, complete_config


def test_the_losses_are_those_of_the_sdk_without_uploaded_code_and_dpo() -> None:
    from tinker.types import LossFnType

    ours = set(get_args(LossName))
    assert ours == {*get_args(LossFnType), "dpo"} - {"custom"}
    assert set(CONTRACTS) == ours


@pytest.mark.parametrize(
    ("loss_fn", "config", "said"),
    [
        ("ppo", {"clip_low": 0.8}, "Did you mean 'clip_low_threshold'?"),
        ("ppo", {"beta": 0.1}, "clip_high_threshold (above 0 up to 10000, default 1.2)"),
        ("importance_sampling", {"beta": 0.1}, "importance_sampling takes no loss_fn_config"),
        ("dro", {}, 'loss_fn_config={"beta": <number>}'),
        ("gspo", {"clip_low_threshold": 0.9}, "gspo needs clip_high_threshold"),
        ("ppo", {"clip_low_threshold": 1.3}, "clip_low_threshold 1.3 is not below"),
        ("dpo", {"beta": 0.0}, "Give a number above 0 up to 100"),
        ("dpo", {"beta": float("nan")}, "dpo: beta in loss_fn_config is nan"),
        ("dpo", {"beta": True}, "dpo: beta in loss_fn_config is True"),
        ("dro", {"beta": -1.0}, "dro: beta in loss_fn_config is -1.0"),
        ("cispo", {"clip_high_threshold": 1e300}, "from 0 up to 10000|above 0 up to 10000"),
        ("pppo", {}, "There is no loss 'pppo'. Did you mean 'ppo'?"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    loss_fn: str, config: dict[str, float], said: str
) -> None:
    with pytest.raises(InvalidInputError) as refused:
        complete_config(loss_fn, config)
    assert any(part in str(refused.value) for part in said.split("|"))


def test_only_what_was_given_is_sent_but_dpo_gets_its_beta() -> None:
    assert complete_config("ppo", {"clip_high_threshold": 1.3}) == {"clip_high_threshold": 1.3}
    assert complete_config("dpo", {}) == {"beta": 0.1}


async def test_datums_of_another_kind_are_refused_with_the_loss_that_fits(
    settings: Settings,
) -> None:
    async with in_memory(settings) as agent:
        on = {
            "client_id": await agent.new_client(),
            "data_id": (await agent.new_data())["data_id"],
        }
        ppo = await agent.error("forward_backward", **on, loss_fn="ppo")
        dpo = await agent.error(
            "train", **on, loss_fn="dpo", steps=1, batch_size=2, learning_rate=1e-3
        )
        # Nothing was sent: the client still stands where it stood.
        assert (await agent.call("forward_backward", **on))["step"] == 0
    assert "ppo is for policy_gradient datums" in ppo
    assert 'Use loss_fn="cross_entropy"' in ppo
    assert "dpo is for preference datums" in dpo


async def group_data(agent: Agent, client_id: str) -> dict[str, Any]:
    drawn = await agent.call(
        "sample", client_id=client_id, prompt="Say", num_samples=4, max_tokens=6, seed=1
    )
    rewarded = [{"group_id": drawn["group_id"], "rewards": [1.0, 0.0, 0.0, 0.0]}]
    return await agent.call("build_datums", kind="policy_gradient", groups=rewarded)


@pytest.mark.parametrize(
    ("loss_fn", "config"),
    [
        ("importance_sampling", {}),
        ("ppo", {"clip_low_threshold": 0.7}),
        ("cispo", {}),
        ("dro", {"beta": 0.1}),
        ("gspo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ],
)
async def test_every_loss_on_samples_takes_a_sampled_group(
    settings: Settings, loss_fn: str, config: dict[str, float]
) -> None:
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        data_id = (await group_data(agent, client_id))["data_id"]
        scored = await agent.call(
            "forward_backward",
            client_id=client_id,
            data_id=data_id,
            loss_fn=loss_fn,
            loss_fn_config=config,
            optim={"learning_rate": 1e-3},
        )
    assert scored["is_finite"]
    assert scored["grad_norm"] > 0


async def test_a_loss_the_local_backend_has_not_is_refused_before_it_is_sent(
    settings: Settings,
) -> None:
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        data_id = (await group_data(agent, client_id))["data_id"]
        on = {"client_id": client_id, "data_id": data_id, "loss_fn": "stable_reinforce"}
        said = await agent.error("forward_backward", **on, optim={"learning_rate": 1e-3})
    assert "stable_reinforce is not served by the local backend" in said


@pytest.mark.parametrize("rate", [True, 1e300, 11, 0])
async def test_a_learning_rate_that_is_none_is_refused(rate: Any) -> None:
    async with in_memory(Settings()) as agent:
        said = await agent.error("optim_step", client_id="client-1", learning_rate=rate)
        nested = await agent.error(
            "forward_backward", client_id="c", data_id="d", optim={"learning_rate": rate}
        )
    assert said.startswith(f"invalid_input: optim_step: learning_rate={rate!r}")
    assert nested.startswith("invalid_input: forward_backward: optim.learning_rate")


async def test_a_count_that_is_a_boolean_is_refused() -> None:
    plan = {"client_id": "c", "data_id": "d", "batch_size": 1, "learning_rate": 1e-3}
    async with in_memory(Settings()) as agent:
        said = await agent.error("train", **plan, steps=True)
    assert "steps=True: Value error, a number is needed, not true or false" in said
