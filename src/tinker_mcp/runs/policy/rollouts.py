"""Sampling groups of answers, scoring them, and making datums of them, by the cookbook.

For workers alone: what rl and distillation share. The policy and the environment of a plain
prompt are ours; environments, advantages and datums are the cookbook's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.rl_options import CACHED_SHARE, MAX_GROUP_SIZE, SamplingOptions
from tinker_mcp.training.policy_gradient import ADVANTAGES
from tinker_mcp.training.rendering import ModelRenderer
from tinker_mcp.training.rewards.contract import Completion, Reward

if TYPE_CHECKING:
    import tinker
    from tinker_cookbook.completers import TokensWithLogprobs
    from tinker_cookbook.rl.types import (
        EnvGroupBuilder,
        StepResult,
        Trajectory,
        TrajectoryGroup,
    )

T = TypeVar("T")

_SEEDS = 2**31
_MANY_GROUPS = 1024  # at once; each is a request or more


@dataclass
class Usage:
    """Tokens that sampling was billed for.

    Attributes:
        prefill: Of prompts, those that were computed before at their share of the price.
        sampled: Of samples.
        logprobs: Sum over those, nats.
    """

    prefill: float = 0.0
    sampled: int = 0
    logprobs: float = 0.0

    def add(self, other: Usage) -> None:
        """Count another's as well."""
        self.prefill += other.prefill
        self.sampled += other.sampled
        self.logprobs += other.logprobs

    @property
    def entropy(self) -> float:
        """Of the policy as its samples tell it, nats a token; 0 where there are none."""
        return -self.logprobs / self.sampled if self.sampled else 0.0

    def usd(self, options: SamplingOptions) -> float:
        """What it cost."""
        prefill, sample = options.prefill_usd_per_million, options.sample_usd_per_million
        return (self.prefill * (prefill or 0.0) + self.sampled * (sample or 0.0)) / 1e6


@dataclass
class Policy:
    """Samples as the cookbook's `TokenCompleter`, for one group.

    What its members ask in the same moment, as with the first turn of a plain prompt, becomes one
    request. Seeds follow from what is asked, so an equal group gets equal samples.

    Attributes:
        seed: Of the group.
        context: Tokens that the model takes, prompt and answer together.
    """

    client: tinker.SamplingClient
    max_tokens: int
    temperature: float
    seed: int
    context: int
    usage: Usage = field(default_factory=Usage)
    _asked: dict[Any, list[asyncio.Future[TokensWithLogprobs]]] = field(default_factory=dict)
    _requests: set[asyncio.Task[None]] = field(default_factory=set)
    _times: dict[bytes, int] = field(default_factory=dict)

    async def __aenter__(self) -> Policy:
        return self

    async def __aexit__(self, *_: object) -> None:
        await _ended(self._requests)

    async def __call__(
        self, model_input: tinker.ModelInput, stop: Any, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        """One sample; an empty one, cut by length, where the prompt leaves no room for it."""
        from tinker_cookbook.completers import TokensWithLogprobs

        room = self.context - model_input.length
        limit = min(self.max_tokens, room, *(() if max_tokens is None else (max_tokens,)))
        if limit <= 0:
            return TokensWithLogprobs([], [], "length")
        answer: asyncio.Future[TokensWithLogprobs] = asyncio.get_running_loop().create_future()
        key = (_content(model_input), repr(stop), limit)
        if key not in self._asked:
            self._asked[key] = []
            send = partial(self._send, key, model_input, stop, limit)
            asyncio.get_running_loop().call_soon(send)  # after the others had their turn
        self._asked[key].append(answer)
        return await answer

    def _send(self, key: Any, prompt: tinker.ModelInput, stop: Any, limit: int) -> None:
        answers = self._asked.pop(key)
        for first in range(0, len(answers), MAX_GROUP_SIZE):
            some = answers[first : first + MAX_GROUP_SIZE]
            request = asyncio.create_task(self._request(prompt, stop, limit, key[0], some))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)

    async def _request(
        self,
        prompt: tinker.ModelInput,
        stop: Any,
        limit: int,
        content: bytes,
        answers: Sequence[asyncio.Future[TokensWithLogprobs]],
    ) -> None:
        import tinker
        from tinker_cookbook.completers import TokensWithLogprobs

        time = self._times[content] = self._times.get(content, 0) + 1
        params = tinker.SamplingParams(
            max_tokens=limit,
            temperature=self.temperature,
            seed=seed_of(self.seed, content, time),
            stop=stop,
        )
        try:
            response = await self.client.sample(prompt, len(answers), params)
        except Exception as error:  # whoever asked gets it
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
            return
        self._count(prompt.length, response)
        for answer, drawn in zip(answers, response.sequences, strict=True):
            if not answer.done():
                sample = TokensWithLogprobs(
                    list(drawn.tokens), list(drawn.logprobs or ()), drawn.stop_reason
                )
                answer.set_result(sample)

    def _count(self, length: int, response: tinker.SampleResponse) -> None:
        known = min(length, response.prompt_cache_hit_tokens)
        repeated = known + (len(response.sequences) - 1) * length
        self.usage.add(
            Usage(
                prefill=length - known + CACHED_SHARE * repeated,
                sampled=sum(len(drawn.tokens) for drawn in response.sequences),
                logprobs=sum(sum(drawn.logprobs or ()) for drawn in response.sequences),
            )
        )


def seed_of(*parts: object) -> int:
    """A seed that follows from its parts, the same in every process."""
    said = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(said[:8], "big") % _SEEDS


def _content(model_input: tinker.ModelInput) -> bytes:
    return hashlib.sha256(model_input.model_dump_json().encode()).digest()


def load_cookbook() -> None:
    """Import what rollouts and steps need, which takes seconds. Blocks."""
    import tinker_cookbook.rl.data_processing
    import tinker_cookbook.rl.metric_util
    import tinker_cookbook.rl.metrics
    import tinker_cookbook.rl.rollout_strategy
    import tinker_cookbook.rl.rollouts
    import tinker_cookbook.utils.lr_scheduling  # noqa: F401 - all of them for their effect


# Groups


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


async def together(work: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """All results, in order; the first failure ends the rest, and is raised as it is."""
    at_once = asyncio.Semaphore(_MANY_GROUPS)

    async def limited(one: Callable[[], Awaitable[T]]) -> T:
        async with at_once:
            return await one()

    tasks = [asyncio.ensure_future(limited(one)) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _ended(tasks)


async def _ended(tasks: Any) -> None:
    """Cancel what is not done, and wait until it is."""
    left = [task for task in tasks if not task.done()]
    for task in left:
        task.cancel()
    if left:
        await asyncio.gather(*left, return_exceptions=True)


@contextlib.asynccontextmanager
async def background() -> AsyncIterator[Callable[[Any], asyncio.Task[Any]]]:
    """Starts tasks; those that still run when the block ends are ended."""
    tasks: list[asyncio.Task[Any]] = []

    def start(work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        tasks[:] = [one for one in tasks if not one.done()]
        tasks.append(task)
        return task

    try:
        yield start
    finally:
        await _ended(tasks)


# From groups to numbers and datums


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
