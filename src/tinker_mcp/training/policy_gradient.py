"""Sampled groups and the rewards given to them, to datums for the policy-gradient losses.

The cookbook does it: advantages within a group, and a datum of each sample, whose prompt carries
advantage 0. Its `mask` (1 at sampled tokens) stays beside the inputs; `losses` sends what a loss
takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.training import checks, datums, marking, rendering
from tinker_mcp.training import groups as groups_kept
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.datums import DatumSet
from tinker_mcp.training.groups import Group
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker
    import torch
    from tinker_cookbook.rl.types import TrajectoryGroup

_MAX_REWARD = 1e6


@dataclass(frozen=True)
class GroupRewards:
    """A sampled group's handle, and one reward for each of its samples in their order."""

    group_id: str
    rewards: Sequence[float]


@dataclass(frozen=True)
class PolicyGradient:
    """Datums under a handle.

    Attributes:
        groups: How many the datums come from.
        constant_groups: How many were left out since no advantage in them differs from 0.
        heated_groups: Sampled at another temperature than 1.
    """

    data: DatumSet
    groups: int
    constant_groups: int
    heated_groups: Sequence[str]
    backend: Backend


async def build(
    workspace: Workspace, groups: Sequence[GroupRewards], advantages: str
) -> PolicyGradient:
    """Make datums of sampled groups and keep them under a new handle.

    Args:
        advantages: `centered` (reward minus the group's mean), `normalized` (that over the
            group's standard deviation) or `raw` (the rewards themselves).

    Raises:
        NotFoundError: There is no such group.
        InvalidInputError: Rewards that do not fit their group or are not finite, groups of several
            models, a group given twice, or no advantage at all.
    """
    if advantages not in ADVANTAGES:
        raise InvalidInputError(
            f"There are no advantages {advantages!r}.",
            next_step=f"Use one of {', '.join(ADVANTAGES)}.",
        )
    sampled = _checked(workspace, groups)
    backend, _ = await workspace.service()
    return await anyio.to_thread.run_sync(
        _build, workspace, backend, sampled, [group.rewards for group in groups], advantages
    )


def _checked(workspace: Workspace, groups: Sequence[GroupRewards]) -> list[Group]:
    if not groups:
        raise InvalidInputError(
            "No groups were given.", next_step="Call sample with num_samples above 1 for one."
        )
    sampled = [_group(workspace, given) for given in groups]
    if len({group.group_id for group in sampled}) < len(sampled):
        raise InvalidInputError(
            "A group is given twice.", next_step="Give each group_id once, with all its rewards."
        )
    first = sampled[0]
    for group in sampled:
        if group.base_model != first.base_model:
            raise InvalidInputError(
                f"{group.group_id} was sampled from {group.base_model}, {first.group_id} from "
                f"{first.base_model}.",
                next_step="Build the datums of each model by themselves.",
            )
    return sampled


def _group(workspace: Workspace, given: GroupRewards) -> Group:
    group = workspace.groups.get(given.group_id)
    if group is None and workspace.was_given("group", given.group_id):
        raise NotFoundError(
            f"{given.group_id} is kept no longer: only the newest {groups_kept.MAX_GROUPS} groups "
            f"are, of at most {groups_kept.MAX_TOKENS:,} tokens together.",
            next_step="Call sample again for a new group; build its datums before many others.",
        )
    if group is None:
        known = ", ".join(list(workspace.groups)[-20:]) or "none"
        raise NotFoundError(
            f"No group {given.group_id!r}; there is: {known}.",
            next_step="Call sample with num_samples above 1 for a group.",
        )
    if len(given.rewards) != len(group.sequences):
        raise InvalidInputError(
            f"{given.group_id} has {len(group.sequences)} samples, but {len(given.rewards)} "
            "rewards were given.",
            next_step="Give one reward for each sample, in the order of their index.",
        )
    for index, reward in enumerate(given.rewards):
        if isinstance(reward, bool) or not math.isfinite(reward) or abs(reward) > _MAX_REWARD:
            raise InvalidInputError(
                f"The reward of sample {index} of {given.group_id} is {reward!r}.",
                next_step=f"Give finite numbers from -{_MAX_REWARD:g} to {_MAX_REWARD:g}.",
            )
    if any(sequence.logprobs is None for sequence in group.sequences):
        raise InvalidInputError(
            f"The backend gave no logprobs for {given.group_id}, which the losses need.",
            next_step="Call sample again for a new group.",
        )
    return group


def _build(
    workspace: Workspace,
    backend: Backend,
    groups: Sequence[Group],
    rewards: Sequence[Sequence[float]],
    advantages: str,
) -> PolicyGradient:
    from tinker_cookbook.rl.data_processing import assemble_training_data

    trajectories = [_trajectories(*pair) for pair in zip(groups, rewards, strict=True)]
    of_groups = [ADVANTAGES[advantages](group) for group in trajectories]
    kept = [index for index, found in enumerate(of_groups) if bool((found != 0).any())]
    if not kept:
        raise InvalidInputError(
            f"All {advantages} advantages are 0: the rewards within each group are equal, so there "
            "is no gradient.",
            next_step="Give rewards that differ, or sample other prompts, at a higher temperature.",
        )
    made, _ = assemble_training_data(
        [trajectories[index] for index in kept], [of_groups[index] for index in kept]
    )
    model = rendering.load(backend, groups[0].base_model, groups[0].renderer)
    return PolicyGradient(
        data=_keep(workspace, model, made),
        groups=len(kept),
        constant_groups=len(groups) - len(kept),
        heated_groups=[group.group_id for group in groups if group.temperature != 1],
        backend=backend,
    )


def _trajectories(group: Group, rewards: Sequence[float]) -> TrajectoryGroup:
    import tinker
    from tinker_cookbook.completers import TokensWithLogprobs
    from tinker_cookbook.rl.types import Trajectory, TrajectoryGroup, Transition

    trajectories = [
        Trajectory(
            [
                Transition(
                    ob=group.prompt,
                    ac=TokensWithLogprobs(list(sample.tokens), list(sample.logprobs or ())),
                    reward=0.0,
                    episode_done=True,
                )
            ],
            final_ob=tinker.ModelInput.empty(),
        )
        for sample in group.sequences
    ]
    return TrajectoryGroup(trajectories, list(rewards), [{} for _ in rewards])


def _centered(group: TrajectoryGroup) -> torch.Tensor:
    from tinker_cookbook.rl.data_processing import compute_advantages
    from tinker_cookbook.utils.misc_utils import all_same

    advantages = compute_advantages([group])[0]
    # The mean of equal numbers may differ from them in the last place: no gradient of noise.
    return advantages * 0 if all_same(group.get_total_rewards()) else advantages


def _normalized(group: TrajectoryGroup) -> torch.Tensor:
    centered = _centered(group)
    deviation = centered.square().mean().sqrt()
    return centered / deviation if deviation > 0 else centered


def _raw(group: TrajectoryGroup) -> torch.Tensor:
    import torch

    return torch.tensor(group.get_total_rewards())


ADVANTAGES: dict[str, Callable[[TrajectoryGroup], torch.Tensor]] = {
    "centered": _centered,
    "normalized": _normalized,
    "raw": _raw,
}


def _keep(workspace: Workspace, model: ModelRenderer, made: Sequence[tinker.Datum]) -> DatumSet:
    for number, datum in enumerate(made):
        what = checks.datum_problem(datum, model.vocabulary_size)
        if what:
            raise InvalidInputError(
                f"Datum {number} of these groups cannot be trained on: {what}.",
                next_step="Sample the groups again with this model, and give finite rewards.",
            )
    data = DatumSet(
        data_id=workspace.next_id("data"),
        base_model=model.model_name,
        renderer=model.name,
        datums=made,
        truncated=0,
        statistics=datums.measure(made),
        example=marking.marked(made[0], model),
        kind="policy_gradient",
    )
    workspace.data[data.data_id] = data
    return data
