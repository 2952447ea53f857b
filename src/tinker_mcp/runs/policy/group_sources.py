"""Where the groups of an rl run come from: prompts with a reward, or an environment."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import anyio.to_thread

from tinker_mcp.runs.attempt import Attempt
from tinker_mcp.runs.policy import environments
from tinker_mcp.runs.policy.rollouts import PromptGroup
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.rl_options import options_of
from tinker_mcp.settings import Settings
from tinker_mcp.training import rendering
from tinker_mcp.training.rendering import ModelRenderer
from tinker_mcp.training.rewards import opening, specs
from tinker_mcp.training.rewards.contract import Reward

NO_HELD_OUT = (
    "The environment {name} holds nothing out, so nothing tells whether the run learns or only "
    "memorizes."
)


class Source(Protocol):
    """Groups of each step, and of an evaluation."""

    @property
    def renderer(self) -> ModelRenderer: ...

    @property
    def has_held_out(self) -> bool:
        """Whether there is anything to evaluate on."""

    def groups(self, step: int) -> Sequence[Any]:
        """EnvGroupBuilders of a step, counted from 1; the same whenever it is asked."""

    def held_out(self) -> Sequence[Any]:
        """Those of an evaluation, by preference of one sample each."""


@dataclass(frozen=True)
class _Prompts:
    """Groups of the run's prompts, scored by its reward."""

    attempt: Attempt
    renderer: ModelRenderer
    reward: Reward

    @property
    def has_held_out(self) -> bool:
        return bool(self.attempt.held_out)

    def groups(self, step: int) -> Sequence[PromptGroup]:
        size = options_of(self.attempt.spec).group_size
        chosen: Sequence[Prompt] = self.attempt.batch(self.attempt.train, step)
        return [PromptGroup(one, self.renderer, size, self.reward) for one in chosen]

    def held_out(self) -> Sequence[PromptGroup]:
        chosen: Sequence[Prompt] = self.attempt.held_out
        return [PromptGroup(one, self.renderer, 1, self.reward) for one in chosen]


@dataclass(frozen=True)
class _Environment:
    """Groups of an environment."""

    renderer: ModelRenderer
    environment: environments.Environment

    @cached_property
    def has_held_out(self) -> bool:
        return bool(self.environment.held_out())

    def groups(self, step: int) -> Sequence[Any]:
        return self.environment.batch(step)

    def held_out(self) -> Sequence[Any]:
        return self.environment.held_out()


@contextlib.asynccontextmanager
async def opened(attempt: Attempt) -> AsyncIterator[Source]:
    """The groups of an rl run, while what they need is open."""
    spec, options = attempt.spec, options_of(attempt.spec)
    renderer = await anyio.to_thread.run_sync(
        rendering.load, attempt.backend, spec.base_model, spec.renderer
    )
    if options.environment is not None:
        place = environments.Place(
            backend=attempt.backend,
            renderer=renderer,
            batch_size=spec.batch_size,
            group_size=options.group_size,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            steps=spec.steps,
            seed=spec.seed,
        )
        source = _Environment(renderer, await environments.opened(options.environment, place))
        if not source.has_held_out:
            attempt.journal.warn(NO_HELD_OUT.format(name=options.environment.name))
        yield source
        return
    reward_spec = specs.spec_of(dict(options.reward or {}))
    _warn_if_changed(attempt, reward_spec)
    # Whether its path may be read was asked when the run was planned.
    settings = replace(Settings.from_environment(os.environ), roots=(Path("/"),))
    async with _judge(attempt, reward_spec) as judge:
        with opening.opened(reward_spec, settings, judge) as reward:
            yield _Prompts(attempt, renderer, reward)


def _warn_if_changed(attempt: Attempt, spec: specs.RewardSpec) -> None:
    known = options_of(attempt.spec).reward_sha256
    if not isinstance(spec, specs.UserFile) or known is None:
        return
    try:
        now = hashlib.sha256(Path(spec.path).read_bytes()).hexdigest()
    except OSError:
        return  # opening it says why
    if now != known:
        attempt.journal.warn(f"The reward {spec.path} was changed since the run was planned.")


@contextlib.asynccontextmanager
async def _judge(attempt: Attempt, spec: specs.RewardSpec) -> AsyncIterator[Reward | None]:
    """What scores where the reward is a model; it has a session of its own."""
    from tinker_mcp.training import sessions
    from tinker_mcp.training.rewards.judge import JudgeReward

    if not isinstance(spec, specs.Judge):
        yield None
        return
    service = await anyio.to_thread.run_sync(sessions.open_service, attempt.backend, attempt.run_id)
    try:
        client = await attempt.answer(
            service.create_sampling_client(
                model_path=spec.checkpoint, base_model=spec.base_model
            ).coroutine()
        )
        renderer = await anyio.to_thread.run_sync(
            rendering.load, attempt.backend, str(client.get_base_model()), spec.renderer
        )
        yield JudgeReward(spec, client, renderer)
    finally:
        await sessions.end([service], attempt.backend)
