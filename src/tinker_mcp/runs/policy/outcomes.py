"""From a step's groups to what is trained on and what is told of them, by the cookbook."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tinker_mcp.runs.policy.rollouts import Rolled
from tinker_mcp.training.policy_gradient import ADVANTAGES

if TYPE_CHECKING:
    import tinker


def datums_of(
    groups: Sequence[Rolled], how: Literal["center", "normalize"], max_length: int
) -> tuple[list[tinker.Datum], int]:
    """Datums with `mask`, of groups whose rewards differ; how many were too long and left out."""
    from tinker_cookbook.rl.data_processing import assemble_training_data

    advantages = ADVANTAGES[{"center": "centered", "normalize": "normalized"}[how]]
    kept = [group.trajectories for group in groups if not group.is_constant]
    made, _ = assemble_training_data(kept, [advantages(group) for group in kept])
    fitting = [
        datum
        for datum in made
        if 0 < datum.model_input.length < max_length
        and float(datum.loss_fn_inputs["mask"].to_numpy().sum()) > 0
    ]
    return fitting, len(made) - len(fitting)


def numbers_of(groups: Sequence[Rolled]) -> dict[str, float]:
    """What a step's groups tell, under the cookbook's names where it has one."""
    from tinker_cookbook.rl.metric_util import compute_trajectory_metrics

    scored = [group for group in groups if group.rewards]
    rewards = [reward for group in scored for reward in group.rewards]
    found = compute_trajectory_metrics(
        [group.trajectories for group in scored], [list(group.tags) for group in scored]
    )
    turns = [
        t for group in scored for one in group.trajectories.trajectories_G for t in one.transitions
    ]
    cut = sum(turn.ac.stop_reason == "length" for turn in turns)
    if rewards:
        found["env/all/reward/std"] = statistics.pstdev(rewards)
        found["env/all/reward/min"], found["env/all/reward/max"] = min(rewards), max(rewards)
        correct = sum(reward > 0.5 for reward in rewards) / len(rewards)
        found.setdefault("env/all/correct", correct)
    else:
        del found["env/all/reward/total"]  # 0 would be a claim
    if turns:
        found["env/all/stop/length"] = cut / len(turns)
        found["env/all/stop/stop"] = 1 - cut / len(turns)
    constant = [group for group in scored if group.is_constant]
    return {
        **found,
        "groups/all": len(groups),
        "groups/constant": len(constant),
        "groups/all_zero": sum(group.rewards[0] == 0 for group in constant),
        "groups/all_one": sum(group.rewards[0] == 1 for group in constant),
        "reward/errors": sum(len(group.left_out) for group in groups),
    }
