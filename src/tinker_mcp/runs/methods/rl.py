"""Reinforcement learning: groups of samples, their rewards, and a step towards the better ones.

The batch of step n is sampled with the weights after step n - 1 - K, K being
`max_off_policy_steps`: with K = 0 each step waits for its samples, with K = 1 the next batch is
sampled while this one trains. New sampler weights are asked for right behind the optim_step.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs import environments, prompts, transcripts
from tinker_mcp.runs.attempt import Attempt, Outcome, positions
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.rl_options import RlOptions
from tinker_mcp.runs.rollouts import (
    Policy,
    PromptGroup,
    Rolled,
    Usage,
    background,
    datums_of,
    numbers_of,
    roll,
    seed_of,
    together,
)
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.settings import Settings
from tinker_mcp.training import losses, rendering
from tinker_mcp.training.rendering import ModelRenderer
from tinker_mcp.training.rewards import opening, specs
from tinker_mcp.training.rewards.contract import Reward

if TYPE_CHECKING:
    import tinker

LOSS = "optim/entropy"
"""What tells a run that has gone wrong: it rises without end, or is no number any more. A reward
may rise and fall for good reasons, and policy-gradient losses mean nothing by themselves."""

FLOOR = 1.0
"""Nats a token: a policy that has become certain may become less so again."""

REWARD = "env/all/reward/total"
KL_ALARM = 0.01
_LOOK_S = 0.5
_UNSCORED_LIMIT = 3  # steps in a row of which no sample has a reward

Start = Callable[[Any], "asyncio.Task[Any]"]


def load(folder: Path, spec: RunSpec) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """What is trained on, and what is held out; nothing where there is an environment. Blocks.

    Raises:
        InvalidInputError: A file is gone, or another one than the run was planned with.
    """
    if options_of(spec).environment is not None:
        return [], []
    train = prompts.load(folder / "data" / prompts.TRAIN, spec.train.sha256)
    if spec.held_out is None:
        return train, []
    return train, prompts.load(folder / "data" / prompts.HELD_OUT, spec.held_out.sha256)


async def train(attempt: Attempt) -> Outcome:
    """From the attempt's first step to its end."""
    spec, options = attempt.spec, options_of(attempt.spec)
    adjusted = _Training(options)
    step = attempt.first_step
    transcripts.rewind(_transcripts(attempt), step)

    async with (
        attempt.opened(LOSS, floor=FLOOR) as client,
        _opened(attempt) as source,
        _reference(attempt, client) as reference,
        background() as start,
    ):
        sampling = _Sampling(attempt, source, start)

        def new_sampler() -> asyncio.Task[tinker.SamplingClient]:
            # In flight: one place for all of a run's sampler weights, not one more each step.
            saved = client.save_weights_and_get_sampling_client(kind="inflight")
            return start(saved.coroutine())

        def evaluate(step: int) -> None:
            if source.held_out():
                sampling.put_evaluation(step, sampler)

        sampler = new_sampler()
        sampling.go_on(step + 1 + options.max_off_policy_steps, sampler, step)
        if step == 0:
            evaluate(step)
        while step < spec.steps:
            batch = await sampling.next()
            if batch is None or attempt.must_end(step + 1, positions(batch.datums)):
                break
            if reference is not None and batch.datums:
                await attempt.answer(adjusted.penalize(attempt, batch, reference))
            step += 1
            batch.tell(attempt, step)
            transcripts.append(
                _transcripts(attempt),
                batch.in_words(options.transcripts, step, source.renderer),
            )
            requests = adjusted.submit(attempt, client, batch, step)
            is_eval_due = attempt.is_eval_due(step) and bool(source.held_out())
            if batch.datums and (is_eval_due or sampling.needs_weights_of(step)):
                sampler = new_sampler()
            attempt.put_step(
                step, batch.datums, requests, partial(adjusted.numbers, attempt, batch, step)
            )
            sampling.go_on(step + 1 + options.max_off_policy_steps, sampler, step)
            if is_eval_due:
                evaluate(step)
            if attempt.is_save_due(step):
                attempt.put_checkpoint(client, step, ttl_s=spec.ttl_s)
            await attempt.room()
        return await attempt.end(client, step)


def options_of(spec: RunSpec) -> RlOptions:
    """The options that an rl run has."""
    assert spec.rl is not None
    return spec.rl


# Where groups come from


class Source(Protocol):
    """Groups of each step, and of an evaluation."""

    renderer: ModelRenderer

    def groups(self, step: int) -> Sequence[Any]:
        """EnvGroupBuilders of a step, counted from 1; the same whenever it is asked."""

    def held_out(self) -> Sequence[Any]:
        """Those of an evaluation, of one sample each."""


@dataclass(frozen=True)
class _Prompts:
    """Groups of the run's prompts, scored by its reward."""

    attempt: Attempt
    renderer: ModelRenderer
    reward: Reward

    def groups(self, step: int) -> Sequence[PromptGroup]:
        size = options_of(self.attempt.spec).group_size
        chosen: Sequence[Prompt] = self.attempt.batch(self.attempt.train, step)  # type: ignore[assignment]
        return [PromptGroup(one, self.renderer, size, self.reward) for one in chosen]

    def held_out(self) -> Sequence[PromptGroup]:
        chosen: Sequence[Prompt] = self.attempt.held_out  # type: ignore[assignment]
        return [PromptGroup(one, self.renderer, 1, self.reward) for one in chosen]


@dataclass(frozen=True)
class _Environment:
    """Groups of an environment."""

    renderer: ModelRenderer
    environment: environments.Environment

    def groups(self, step: int) -> Sequence[Any]:
        return self.environment.batch(step)

    def held_out(self) -> Sequence[Any]:
        return ()


@contextlib.asynccontextmanager
async def _opened(attempt: Attempt) -> AsyncIterator[Source]:
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
        yield _Environment(renderer, await environments.opened(options.environment, place))
        return
    assert options.reward is not None
    reward_spec = specs.spec_of(dict(options.reward))
    # Whether its path may be read was asked when the run was planned.
    settings = replace(Settings.from_environment(os.environ), roots=(Path("/"),))
    async with _judge(attempt, reward_spec) as judge:
        with opening.opened(reward_spec, settings, judge) as reward:
            yield _Prompts(attempt, renderer, reward)


@contextlib.asynccontextmanager
async def _judge(attempt: Attempt, spec: specs.RewardSpec) -> AsyncIterator[Reward | None]:
    """What scores where the reward is a model; it has a session of its own."""
    from tinker_mcp.training import sessions
    from tinker_mcp.training.rewards.judge import JudgeReward

    if not isinstance(spec, specs.Judge):
        yield None
        return
    service = await anyio.to_thread.run_sync(
        sessions.open_service, attempt.backend, attempt.run_id
    )
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


@contextlib.asynccontextmanager
async def _reference(
    attempt: Attempt, client: tinker.TrainingClient
) -> AsyncIterator[tinker.SamplingClient | None]:
    """A sampler of the run's start, where a KL penalty asks for it."""
    if not options_of(attempt.spec).kl_coef:
        yield None
    elif attempt.first_step == 0:  # the client has those weights still
        saved = client.save_weights_and_get_sampling_client()
        yield await attempt.answer(saved.coroutine())
    else:
        async with attempt.frozen_start() as frozen:
            saved = frozen.save_weights_and_get_sampling_client()
            yield await attempt.answer(saved.coroutine())


# Batches, sampled ahead of their steps


@dataclass
class Batch:
    """What a step is trained on.

    Attributes:
        weights_step: The step whose weights sampled it.
        datums: With `mask`; none where no group carries a gradient.
        too_long: Datums left out since the model does not take so many tokens.
    """

    groups: Sequence[Rolled]
    weights_step: int
    datums: list[tinker.Datum]
    too_long: int
    usage: Usage
    seconds: float
    kl_to_start: float | None = None

    @property
    def left_out(self) -> Sequence[str]:
        """Why samples have no reward."""
        return [why for group in self.groups for why in group.left_out]

    @property
    def is_unscored(self) -> bool:
        """Whether not one sample has a reward."""
        return bool(self.left_out) and not any(group.rewards for group in self.groups)

    def tell(self, attempt: Attempt, step: int) -> None:
        """Warn of samples that are left out."""
        if self.left_out:
            attempt.journal.note(
                f"Step {step}: {len(self.left_out)} samples have no reward and are left out: "
                f"{self.left_out[0][:300]}"
            )

    def in_words(
        self, count: int, step: int, renderer: ModelRenderer
    ) -> list[dict[str, Any]]:
        """Some of its samples, and why the first without a reward has none."""
        lines = transcripts.chosen(self.groups, count, step, renderer)
        if count and self.left_out:
            lines.append({"step": step, "error": self.left_out[0][:1000]})
        return lines


@dataclass
class _Sampling:
    """The batches that are being sampled, in the order of their steps."""

    attempt: Attempt
    source: Source
    start: Start
    _coming: deque[asyncio.Task[Batch]] = field(default_factory=deque)
    _begun: int = field(init=False)  # the last step whose sampling has begun
    _unscored: int = 0
    _refused: str | None = None

    def __post_init__(self) -> None:
        self._begun = self.attempt.first_step

    def needs_weights_of(self, step: int) -> bool:
        """Whether a batch still is to be sampled with the weights after a step."""
        return self._begun < self.attempt.spec.steps

    def go_on(
        self, until: int, sampler: asyncio.Task[tinker.SamplingClient], weights_step: int
    ) -> None:
        """Begin with the batches up to a step, as far as the money goes."""
        while self._begun < min(until, self.attempt.spec.steps) and self._refused is None:
            groups = self.source.groups(self._begun + 1)
            bound = _bound(groups, options_of(self.attempt.spec))
            if not self._spend(self._begun + 1, bound):
                return
            self._begun += 1
            work = self._batch(groups, sampler, self._begun, weights_step, bound)
            self._coming.append(self.start(work))

    async def next(self) -> Batch | None:
        """The batch of the step to come; None where the run is to end before it is there."""
        attempt = self.attempt
        if not self._coming:
            attempt.outcome = attempt.outcome or Outcome("stopped", "budget", self._refused or "")
            return None
        task = self._coming[0]

        async def come_or_stopped() -> None:
            while not task.done() and not attempt.journal.stop_asked:
                await asyncio.wait({task}, timeout=_LOOK_S)
                await attempt.room()  # the numbers of the step before

        with attempt.telling_divergence():
            await attempt.answer(come_or_stopped())
            if task.done():
                self._coming.popleft()
                return self._scored(task.result())
        attempt.must_end(self._begun, 0)
        return None

    def put_evaluation(self, step: int, sampler: asyncio.Task[tinker.SamplingClient]) -> None:
        """Sample one answer to each held-out prompt; its rewards are recorded in their turn."""
        groups = self.source.held_out()
        options = options_of(self.attempt.spec)
        bound = _bound(groups, options)
        if not self._affords(bound.usd(options)):
            self.attempt.journal.warn(f"The evaluation at step {step} was left out: max_usd.")
            return
        self._charge(bound)

        async def evaluated() -> Mapping[str, float]:
            batch = await self._rolled(groups, sampler, "eval")
            self._correct(batch, bound)
            numbers = numbers_of(batch)
            return {f"test/{name}": value for name, value in numbers.items()}

        self.attempt.put(
            evaluated(), lambda found: self.attempt.journal.evaluation(step, found)
        )

    async def _batch(
        self,
        groups: Sequence[Any],
        sampler: asyncio.Task[tinker.SamplingClient],
        step: int,
        weights_step: int,
        bound: Usage,
    ) -> Batch:
        spec, options = self.attempt.spec, options_of(self.attempt.spec)
        await asyncio.wait({sampler})
        began = time.monotonic()
        rolled = await self._rolled(groups, sampler, step)
        self._correct(rolled, bound)
        datums, too_long = await anyio.to_thread.run_sync(
            datums_of, rolled, options.advantage, spec.max_length
        )
        usage = Usage()
        for group in rolled:
            usage.add(group.usage)
        return Batch(rolled, weights_step, datums, too_long, usage, time.monotonic() - began)

    async def _rolled(
        self,
        groups: Sequence[Any],
        sampler: asyncio.Task[tinker.SamplingClient],
        step: int | str,
    ) -> list[Rolled]:
        spec, options = self.attempt.spec, options_of(self.attempt.spec)
        client = await asyncio.shield(sampler)

        def policy(place: int) -> Policy:
            return Policy(
                client=client,
                max_tokens=options.max_tokens,
                temperature=options.temperature,
                seed=seed_of(spec.seed, step, place),
                context=spec.max_length,
            )

        return await together(
            [partial(roll, group, policy(place)) for place, group in enumerate(groups)]
        )

    def _scored(self, batch: Batch) -> Batch:
        """The batch, unless for too long nothing could be scored at all.

        Raises:
            InvalidInputError: So it is, and training on would be for nothing.
        """
        self._unscored = self._unscored + 1 if batch.is_unscored else 0
        if self._unscored >= _UNSCORED_LIMIT:
            raise InvalidInputError(
                f"In {self._unscored} steps in a row no sample has a reward: "
                f"{batch.left_out[0][:400]}",
                next_step="Mend the reward (test_reward tries it), then call resume_run.",
            )
        return batch

    def _spend(self, step: int, bound: Usage) -> bool:
        usd = bound.usd(options_of(self.attempt.spec))
        if not self._affords(usd):
            spec, spent = self.attempt.spec, self.attempt.journal.spent_usd
            self._refused = (
                f"Sampling for step {step} could cost ${usd:.4f}, and of max_usd "
                f"${spec.max_usd:.2f} ${spent:.4f} are spent."
            )
            return False
        self._charge(bound)
        return True

    def _affords(self, usd: float) -> bool:
        limit = self.attempt.spec.max_usd
        return limit is None or self.attempt.journal.spent_usd + usd <= limit

    def _charge(self, usage: Usage) -> None:
        usd = usage.usd(options_of(self.attempt.spec))
        self.attempt.journal.spend(round(usage.prefill) + usage.sampled, usd)

    def _correct(self, rolled: Sequence[Rolled], bound: Usage) -> None:
        """Take back what was counted before and not used."""
        rest = Usage(-bound.prefill, -bound.sampled)
        for group in rolled:
            rest.add(group.usage)
        self._charge(rest)


def _bound(groups: Sequence[Any], options: RlOptions) -> Usage:
    """At most so much for a batch; of an environment, whose turns are its own, for one turn."""
    own = [group for group in groups if isinstance(group, PromptGroup)]
    others = len(groups) - len(own)
    samples = sum(group.group_size for group in own) + others * options.group_size
    prefill = sum(group.model_input.length * group.group_size for group in own)
    return Usage(prefill=prefill, sampled=samples * options.max_tokens)


# The step itself


@dataclass
class _Training:
    """What is done with a batch."""

    options: RlOptions
    _is_alarmed: bool = False

    async def penalize(
        self, attempt: Attempt, batch: Batch, reference: tinker.SamplingClient
    ) -> None:
        """Take the penalty for leaving the start from the advantages, token by token."""
        from tinker_cookbook.rl.metrics import incorporate_kl_penalty

        price = self.options.prefill_usd_per_million or 0.0
        tokens = positions(batch.datums)
        attempt.journal.spend(tokens, tokens * price / 1e6)
        scorer: Any = _Scorer(reference)
        found = await incorporate_kl_penalty(batch.datums, scorer, self.options.kl_coef, 0.0)
        batch.kl_to_start = found["kl_policy_base"]

    def submit(
        self, attempt: Attempt, client: tinker.TrainingClient, batch: Batch, step: int
    ) -> tuple[_Joined, _Joined]:
        """All substeps of a step, before the first of them is awaited."""
        from tinker_cookbook.utils.misc_utils import split_list

        if not batch.datums:
            return _Joined([]), _Joined([])
        attempt.journal.spend(positions(batch.datums))
        name: Any = self.options.loss_fn
        config = self.options.loss_config or None
        gradients, steps = [], []
        for part in split_list(batch.datums, min(self.options.substeps, len(batch.datums))):
            gradients.append(client.forward_backward(losses.fitted(name, part), name, config))
            steps.append(client.optim_step(attempt.adam(step)))
        return _Joined(gradients), _Joined(steps)

    def numbers(
        self, attempt: Attempt, batch: Batch, step: int, joined: _Joined
    ) -> dict[str, float]:
        """What a step is recorded with."""
        from tinker_cookbook.rl.metrics import compute_kl_sample_train

        found = {
            **numbers_of(batch.groups),
            LOSS: batch.usage.entropy,
            "off_policy_steps": step - 1 - batch.weights_step,
            "time/sampling": batch.seconds,
            "time/training": joined.seconds,
            "sampling/prefill_tokens": batch.usage.prefill,
            "sampling/sampled_tokens": batch.usage.sampled,
            "datums/too_long": batch.too_long,
        }
        if batch.kl_to_start is not None:
            found["kl_policy_base"] = batch.kl_to_start
        if not joined.answers:
            return found
        logprobs = [
            of_datum["logprobs"].to_torch()
            for answer in joined.answers
            for of_datum in answer.loss_fn_outputs
        ]
        drift = compute_kl_sample_train(batch.datums, logprobs)
        found["optim/kl_sample_train_v1"] = drift["optim/kl_sample_train_v1"]
        found["optim/kl_sample_train_v2"] = drift["optim/kl_sample_train_v2"]
        found["loss"] = sum(answer.metrics["loss:sum"] for answer in joined.answers)
        if not all(map(math.isfinite, (found["loss"], found["optim/kl_sample_train_v2"]))):
            found[LOSS] = math.nan
        self._alarm(attempt, step, found["optim/kl_sample_train_v2"])
        return found

    def _alarm(self, attempt: Attempt, step: int, kl: float) -> None:
        if kl <= KL_ALARM or self._is_alarmed:
            return
        self._is_alarmed = True
        old = [
            f"max_off_policy_steps is {self.options.max_off_policy_steps}"
            if self.options.max_off_policy_steps
            else "",
            f"substeps is {self.options.substeps}" if self.options.substeps > 1 else "",
            f"temperature is {self.options.temperature:g}" if self.options.temperature != 1 else "",
        ]
        why = ", ".join(filter(None, old)) or "the sampler and the trainer do not agree"
        attempt.journal.warn(
            f"The KL between sampler and trainer was {kl:.3g} at step {step}, above {KL_ALARM}: "
            f"the samples come from another policy than the one that learns from them ({why}). "
            "A lower learning_rate helps."
        )


class _Scorer:
    """A sampling client as the cookbook's KL penalty calls it."""

    def __init__(self, client: tinker.SamplingClient) -> None:
        self._client = client

    async def compute_logprobs_async(self, prompt: tinker.ModelInput) -> list[float | None]:
        return await self._client.compute_logprobs(prompt)


@dataclass
class _Joined:
    """Requests that were submitted together and are answered as one.

    Attributes:
        answers: In order, once `coroutine` has ended.
        seconds: Until then, since they were submitted.
    """

    requests: Sequence[Any]
    answers: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    async def coroutine(self) -> _Joined:
        """As the SDK's futures have it."""
        for request in self.requests:
            self.answers.append(await request)
        self.seconds = time.monotonic() - self._began if self.requests else 0.0
        return self

    @property
    def metrics(self) -> dict[str, float] | None:
        """Of the last optim_step."""
        return self.answers[-1].metrics if self.answers else None


def _transcripts(attempt: Attempt) -> Path:
    return transcripts.path_in(attempt.journal.folder.path)
