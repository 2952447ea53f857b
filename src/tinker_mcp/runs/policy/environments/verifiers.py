"""Environments of verifiers, which roll out and score a group by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinker_mcp.runs.policy.completer import Policy
from tinker_mcp.runs.policy.environments.place import Environment, Place, refused
from tinker_mcp.training.loop import batch_of

if TYPE_CHECKING:
    from tinker_cookbook.rl.types import TrajectoryGroup


def opened(name: str, args: Mapping[str, Any], place: Place) -> Environment:
    """An installed environment; none of its rows is held out.

    Raises:
        InvalidInputError: There is none, or it cannot be made with these arguments.
    """
    import verifiers
    from tinker_cookbook.recipes.verifiers_rl.verifiers_env import VerifiersEnvGroupBuilder

    with refused(f"verifiers:{name}"):
        environment = verifiers.load_environment(name, **args)
        rows = environment.get_dataset(n=-1, seed=place.seed)
    builders = [
        VerifiersEnvGroupBuilder(
            vf_env=environment,
            prompt=row["prompt"],
            example_id=row["example_id"],
            task=row["task"],
            answer=row.get("answer", ""),
            info=row.get("info", {}),
        )
        for row in rows
    ]
    return _Environment(builders, place)


@dataclass(frozen=True)
class _Environment:
    builders: Sequence[Any]
    place: Place

    def batch(self, step: int) -> Sequence[Any]:
        place = self.place
        chosen = batch_of(self.builders, place.batch_size, step - 1, place.seed)
        return [_Group(builder, place) for builder in chosen]

    def held_out(self) -> Sequence[Any]:
        return ()


@dataclass
class _Group:
    """A group that `verifiers` rolls out and scores by itself, asking our policy's client."""

    builder: Any
    place: Place

    async def roll(self, policy: Policy) -> TrajectoryGroup:
        from tinker_cookbook.recipes.verifiers_rl.tinker_openai import TinkerAsyncOpenAIClient
        from tinker_cookbook.recipes.verifiers_rl.verifiers_env import (
            convert_states_to_trajectory_group,
        )
        from verifiers.utils.async_utils import maybe_semaphore

        renderer = self.place.renderer
        states = await self.builder.vf_env.run_group(
            group_inputs=self.builder.get_rollout_inputs(self.place.group_size),
            client=TinkerAsyncOpenAIClient(policy.client, renderer.renderer, renderer.tokenizer),
            model="tinker",
            gen_sampling_args={
                "max_tokens": self.place.max_tokens,
                "temperature": self.place.temperature,
            },
            gen_sem=await maybe_semaphore(-1),
            score_sem=await maybe_semaphore(-1),
        )
        group: TrajectoryGroup = convert_states_to_trajectory_group(states)
        for trajectory in group.trajectories_G:
            for turn in trajectory.transitions:
                policy.usage.prefill += turn.ob.length
                policy.usage.sampled += len(turn.ac.tokens)
                policy.usage.logprobs += sum(turn.ac.logprobs)
        return group

    def logging_tags(self) -> list[str]:
        tags: list[str] = self.builder.logging_tags()
        return tags
