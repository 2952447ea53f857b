"""RL by hand: sample, score, train, and no token crosses the agent's context."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from agents import TINY, in_memory

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.settings import Settings
from tinker_mcp.training.backend import Backend, BackendConnector
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.groups import MAX_GROUPS, Group, SampledSequence, keep
from tinker_mcp.training.policy_gradient import GroupRewards, build

PROMPT = [7, 8, 9]
DRAWN = ([20, 21], [30, 31, 32])
QUESTION = [{"role": "user", "content": "Say red."}]


@pytest.fixture
async def workspace(settings: Settings, backend: Backend) -> AsyncIterator[Workspace]:
    """A workspace with two groups of two samples each."""
    opened = Workspace(BackendConnector(settings))
    for number in (1, 2):
        opened.groups[f"group-{number}"] = group(f"group-{number}")
    yield opened
    await opened.close()


async def test_a_group_that_is_kept_no_longer_says_what_to_do(settings: Settings) -> None:
    opened = Workspace(BackendConnector(settings))
    for _ in range(MAX_GROUPS + 1):
        keep(opened.groups, group(opened.next_id("group")))
    assert len(opened.groups) == MAX_GROUPS
    assert next(iter(opened.groups)) == "group-2"
    with pytest.raises(NotFoundError, match=r"group-1 is kept no longer.* Call sample again"):
        await build(opened, [GroupRewards("group-1", [1.0, 0.0])], "centered")
    with pytest.raises(NotFoundError, match="No group 'group-999'"):
        await build(opened, [GroupRewards("group-999", [1.0, 0.0])], "centered")


def test_few_large_groups_are_kept_as_far_as_their_tokens_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tinker_mcp.training.groups.MAX_TOKENS", 2 * group("any").tokens)
    kept: dict[str, Group] = {}
    for number in range(5):
        keep(kept, group(f"group-{number}"))
    assert list(kept) == ["group-3", "group-4"]


async def test_a_group_sampled_at_another_temperature_is_told_of(workspace: Workspace) -> None:
    workspace.groups["group-1"] = replace(workspace.groups["group-1"], temperature=0.7)
    rewards = [GroupRewards(name, [1.0, 0.0]) for name in ("group-1", "group-2")]
    assert (await build(workspace, rewards, "centered")).heated_groups == ["group-1"]


def group(group_id: str, base_model: str = TINY) -> Group:
    import tinker

    return Group(
        group_id=group_id,
        base_model=base_model,
        renderer="role_colon",
        prompt=tinker.ModelInput.from_ints(PROMPT),
        sequences=[SampledSequence(tokens, [-0.5] * len(tokens)) for tokens in DRAWN],
        weights="client-1 at step 0",
    )


async def test_the_prompt_has_no_advantage_and_every_sampled_token_its_samples(
    workspace: Workspace,
) -> None:
    built = await build(workspace, [GroupRewards("group-1", [1.0, 0.0])], "centered")
    first, second = built.data.datums
    assert first.model_input.to_ints() == [7, 8, 9, 20]
    inputs = {name: values.tolist() for name, values in first.loss_fn_inputs.items()}
    assert inputs["target_tokens"] == [8, 9, 20, 21]
    assert inputs["logprobs"] == [0, 0, -0.5, -0.5]
    assert inputs["advantages"] == [0, 0, 0.5, 0.5]
    assert second.loss_fn_inputs["advantages"].tolist() == [0, 0, -0.5, -0.5, -0.5]
    assert (built.data.kind, built.groups, built.constant_groups) == ("policy_gradient", 1, 0)
    assert workspace.data[built.data.data_id] is built.data
    assert built.data.statistics.trained == 5
    assert "⟦" in built.data.example


@pytest.mark.parametrize(
    ("advantages", "expected"),
    [("centered", [2.0, -2.0]), ("normalized", [1.0, -1.0]), ("raw", [5.0, 1.0])],
)
async def test_advantages_are_of_the_group(
    workspace: Workspace, advantages: str, expected: list[float]
) -> None:
    built = await build(workspace, [GroupRewards("group-1", [5.0, 1.0])], advantages)
    last = [datum.loss_fn_inputs["advantages"].tolist()[-1] for datum in built.data.datums]
    assert last == pytest.approx(expected)


async def test_a_group_of_equal_rewards_is_left_out_and_counted(workspace: Workspace) -> None:
    rewards = [GroupRewards("group-1", [0.1, 0.1]), GroupRewards("group-2", [1.0, 0.0])]
    built = await build(workspace, rewards, "normalized")
    assert (len(built.data.datums), built.groups, built.constant_groups) == (2, 1, 1)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([("group-1", [1.0])], "group-1 has 2 samples, but 1 rewards were given"),
        ([("group-1", [1.0, float("nan")])], "The reward of sample 1 of group-1 is nan"),
        ([("group-1", [1.0, 1e30])], "The reward of sample 1 of group-1 is 1e+30"),
        ([("group-1", [1.0, 0.0]), ("group-1", [1.0, 0.0])], "A group is given twice"),
        ([("group-1", [1.0, 1.0])], "All centered advantages are 0"),
        ([("group-1", [1.0, 0.0]), ("other", [1.0, 0.0])], "other was sampled from some/model"),
        ([], "No groups were given"),
    ],
)
async def test_rewards_that_do_not_fit_are_refused(
    workspace: Workspace, rewards: list[tuple[str, list[float]]], said: str
) -> None:
    workspace.groups["other"] = group("other", "some/model")
    with pytest.raises(InvalidInputError, match="^" + said.replace("+", r"\+")):
        await build(workspace, [GroupRewards(*given) for given in rewards], "centered")


async def test_an_unknown_group_names_those_there_are(workspace: Workspace) -> None:
    with pytest.raises(NotFoundError, match="No group 'group-9'; there is: group-1, group-2"):
        await build(workspace, [GroupRewards("group-9", [1.0, 0.0])], "centered")


async def test_a_rewarded_answer_becomes_likelier(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        asked: dict[str, Any] = {"messages": QUESTION, "max_tokens": 6, "seed": 3}
        drawn = await agent.call("sample", client_id=client_id, **asked, num_samples=4)
        rewarded = [{"group_id": drawn["group_id"], "rewards": [1.0, 0.0, 0.0, 0.0]}]
        data = await agent.call("build_datums", kind="policy_gradient", groups=rewarded)
        on: dict[str, Any] = {
            "client_id": client_id,
            "data_id": data["data_id"],
            "loss_fn": "importance_sampling",
        }
        first = await agent.call("forward_backward", **on, forward_only=True)
        for _ in range(4):
            await agent.call("forward_backward", **on, optim={"learning_rate": 3e-3})
        again = await agent.call("forward_backward", **on, forward_only=True)
        only_good: dict[str, Any] = {**on, "limit": 1, "forward_only": True}
        of_good = await agent.call("forward_backward", **only_good)
    # -sum(r * A): at the start every ratio r is 1, and centered advantages nearly cancel out.
    assert again["loss_sum"] < first["loss_sum"]
    # Of the rewarded sample alone it is -0.75 * (sum of r over its tokens): r above 1 is likelier.
    assert -of_good["loss_sum"] / (0.75 * of_good["trained_tokens"]) > 1
