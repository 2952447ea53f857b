"""Sampling groups of answers and scoring them, by the cookbook.

For workers alone: what rl and distillation share. The policy and the environment of a plain
prompt are ours; environments are the cookbook's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from tinker_mcp.runs.policy.completer import Policy, Usage
from tinker_mcp.runs.policy.tasks import together
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.training import libraries
from tinker_mcp.training.rendering import ModelRenderer
from tinker_mcp.training.rewards.contract import Completion, Reward

if TYPE_CHECKING:
    import tinker
    from tinker_cookbook.rl.types import (
        EnvGroupBuilder,
        StepResult,
        Trajectory,
        TrajectoryGroup,
    )


def load_cookbook() -> None:
    """Import what rollouts and steps need, which takes seconds. Blocks."""
    with libraries.loading():
        import tinker_cookbook.rl.data_processing
        import tinker_cookbook.rl.metric_util
        import tinker_cookbook.rl.metrics
        import tinker_cookbook.rl.rollout_strategy
        import tinker_cookbook.rl.rollouts
        import tinker_cookbook.utils.lr_scheduling  # noqa: F401 - all of them for their effect


@dataclass
class PromptEnv:
    """One answer to one prompt, as the cookbook's `Env`; its reward is given by its group."""

    prompt: tinker.ModelInput
    stop: Any

    async def initial_observation(self) -> tuple[tinker.ModelInput, Any]:
        return self.prompt, self.stop

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        import tinker
        from tinker_cookbook.rl.types import StepResult

        return StepResult(
            reward=0.0,
            episode_done=True,
            next_observation=tinker.ModelInput.empty(),
            next_stop_condition=[],
        )


@dataclass
class PromptGroup:
    """Several answers to one prompt, as the cookbook's `EnvGroupBuilder`.

    Attributes:
        reward: None gives each answer 0.
        left_out: Why samples have no reward, by their place in the group.
    """

    prompt: Prompt
    renderer: ModelRenderer
    group_size: int
    reward: Reward | None = None
    left_out: dict[int, str] = field(default_factory=dict)

    @property
    def model_input(self) -> tinker.ModelInput:
        """The prompt's tokens."""
        return self.renderer.prompt(cast("Any", self.prompt.messages))

    async def make_envs(self) -> Sequence[PromptEnv]:
        return [PromptEnv(self.model_input, self.renderer.stop()) for _ in range(self.group_size)]

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Any]
    ) -> list[tuple[float, dict[str, float | int]]]:
        if self.reward is None:
            return [(0.0, {}) for _ in trajectory_group]
        said = [trajectory.transitions[-1].ac.tokens for trajectory in trajectory_group]
        completions = [Completion(self.renderer.answer(one)[0], len(one)) for one in said]
        scored = await self.reward.score(completions, [self.prompt.row] * len(completions))
        self.left_out = {
            place: one.error or "it has no value"
            for place, one in enumerate(scored)
            if one.value is None
        }
        return [
            (0.0, {}) if one.value is None else (one.value, {"correct": float(one.value > 0.5)})
            for one in scored
        ]

    async def cleanup(self) -> None:
        """There is nothing to clean."""

    def logging_tags(self) -> list[str]:
        return []


@dataclass(frozen=True)
class Rolled:
    """A group that was sampled and scored; samples without a reward are not in it.

    Attributes:
        left_out: Why samples are not.
    """

    trajectories: TrajectoryGroup
    left_out: Sequence[str]
    tags: Sequence[str]
    usage: Usage

    @property
    def rewards(self) -> list[float]:
        """One a sample."""
        return self.trajectories.get_total_rewards()

    @property
    def is_constant(self) -> bool:
        """Whether it carries no gradient."""
        return len(set(self.rewards)) <= 1


class _Together:
    """All rollouts of a group at once, as the cookbook's `RolloutStrategy`.

    A failing one ends the others, where the cookbook's own would leave them running.
    """

    catches_group_errors = False

    async def execute(self, env_group_builder: EnvGroupBuilder, policy: Any) -> Any:
        from tinker_cookbook.rl.rollout_strategy import RolloutResult
        from tinker_cookbook.rl.rollouts import do_single_rollout

        envs = await env_group_builder.make_envs()
        trajectories = await together([partial(do_single_rollout, policy, env) for env in envs])
        return RolloutResult(trajectories=trajectories, envs=envs, errors=[])


async def roll(builder: Any, policy: Policy) -> Rolled:
    """Sample and score a group; nothing of it is left running, however this ends."""
    from tinker_cookbook.rl.rollouts import do_group_rollout

    async with policy:
        if hasattr(builder, "roll"):  # an environment that does it all by itself
            group = await builder.roll(policy)
        else:
            group = await do_group_rollout(
                builder, cast("Any", policy), strategy=cast("Any", _Together())
            )
    left_out: Mapping[int, str] = getattr(builder, "left_out", {})
    return Rolled(
        _without(group, left_out), list(left_out.values()), builder.logging_tags(), policy.usage
    )


def _without(group: TrajectoryGroup, places: Mapping[int, str]) -> TrajectoryGroup:
    from tinker_cookbook.rl.types import TrajectoryGroup

    kept = [place for place in range(len(group.trajectories_G)) if place not in places]
    return TrajectoryGroup(
        [group.trajectories_G[place] for place in kept],
        [group.final_rewards_G[place] for place in kept],
        [group.metrics_G[place] for place in kept],
    )
