"""Reinforcement learning: groups of samples, their rewards, and a step towards the better ones.

The batch of step n is sampled with the weights after step n - 1 - K, K being
`max_off_policy_steps`: with K = 0 each step waits for its samples, with K = 1 the next batch is
sampled while this one trains. New sampler weights are asked for right behind the optim_step.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs import prompts, transcripts
from tinker_mcp.runs.ahead import Ahead, Bill
from tinker_mcp.runs.attempt import Attempt, Outcome, positions
from tinker_mcp.runs.policy import group_sources
from tinker_mcp.runs.policy.completer import Policy, Usage, seed_of
from tinker_mcp.runs.policy.drift import CookbookScorer, KlAlarm
from tinker_mcp.runs.policy.group_sources import Source
from tinker_mcp.runs.policy.outcomes import datums_of, numbers_of
from tinker_mcp.runs.policy.rollouts import PromptGroup, Rolled, load_cookbook, roll
from tinker_mcp.runs.policy.tasks import background, together
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.rl_options import RlOptions, options_of
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.training import losses
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

LOSS = "optim/entropy"
"""What tells a run that has gone wrong: it rises without end, or is no number any more. A reward
may rise and fall for good reasons, and policy-gradient losses mean nothing by themselves."""

FLOOR = 1.0
"""Nats a token: a policy that has become certain may become less so again."""

REWARD = "env/all/reward/total"
_UNSCORED_LIMIT = 3  # steps in a row of which no sample has a reward


def load(folder: Path, spec: RunSpec) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """What is trained on, and what is held out; nothing where there is an environment. Blocks.

    Raises:
        InvalidInputError: A file is gone, or another one than the run was planned with.
    """
    if options_of(spec).environment is not None:
        return [], []
    return prompts.load_both(folder, spec)


async def train(attempt: Attempt) -> Outcome:
    """From the attempt's first step to its end."""
    spec, options = attempt.spec, options_of(attempt.spec)
    alarm = KlAlarm(
        attempt.journal, options.max_off_policy_steps, options.temperature, options.substeps
    )
    training = _Training(options, alarm)
    step = attempt.first_step
    transcripts.rewind(_transcripts(attempt), step)

    await anyio.to_thread.run_sync(load_cookbook)  # before a client is there to stand idle
    async with (
        group_sources.opened(attempt) as source,
        attempt.opened(LOSS, floor=FLOOR) as client,
        _reference(attempt, client) as reference,
        background() as start,
    ):
        batches = _Batches(attempt, source)
        ahead = Ahead(attempt, start, batches.bound, batches.make)

        def new_sampler(kind: Any) -> asyncio.Task[tinker.SamplingClient]:
            return start(client.save_weights_and_get_sampling_client(kind=kind).coroutine())

        def evaluate(step: int) -> None:
            bound = batches.evaluation_bound
            if not ahead.affords(bound):
                attempt.journal.warn(f"The evaluation at step {step} was left out: max_usd.")
                return
            # Not the in-flight weights, which will be others before all is sampled.
            work = batches.evaluated(new_sampler("snapshot"))
            attempt.put(ahead.paid(work, bound), partial(attempt.journal.evaluation, step))

        sampler = new_sampler("inflight")  # one place for all, not one more each step
        ahead.go_on(step + 1 + options.max_off_policy_steps, sampler, step)
        if step == 0 and source.has_held_out:
            evaluate(step)
        while step < spec.steps:
            batch = await ahead.next()
            tokens = positions(batch.datums) if batch else 0
            if attempt.must_end(step + 1, tokens) or batch is None:
                break
            batches.check(batch)
            if reference is not None and batch.datums:
                await attempt.answer(training.penalize(attempt, batch, reference))
            step += 1
            _tell(attempt, batch, step, source.renderer)
            requests = training.submit(attempt, client, batch, step)
            if batch.datums and ahead.needs_weights:
                sampler = new_sampler("inflight")
            attempt.put_step(
                step, batch.datums, requests, partial(training.numbers, attempt, batch, step)
            )
            ahead.go_on(step + 1 + options.max_off_policy_steps, sampler, step)
            if source.has_held_out and attempt.is_eval_due(step):
                evaluate(step)
            if attempt.is_save_due(step):
                attempt.put_checkpoint(client, step, ttl_s=spec.ttl_s)
            await attempt.room()
        return await attempt.end(client, step)


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


@dataclass
class _Batches:
    """Samples and scores batches.

    Attributes:
        unscored: Steps in a row of which no sample has a reward.
    """

    attempt: Attempt
    source: Source
    unscored: int = 0

    def bound(self, step: int) -> Bill:
        """What the samples of a step, counted from 1, cost at most."""
        return _bound(self.source.groups(step), options_of(self.attempt.spec))

    @property
    def evaluation_bound(self) -> Bill:
        """The same of an evaluation."""
        return _bound(self.source.held_out(), options_of(self.attempt.spec))

    async def make(
        self, step: int, client: tinker.SamplingClient, weights_step: int
    ) -> tuple[Batch, Bill]:
        """The batch of a step, and what its samples cost."""
        spec, options = self.attempt.spec, options_of(self.attempt.spec)
        began = time.monotonic()
        groups = await self._rolled(self.source.groups(step), client, step)
        datums, too_long = await anyio.to_thread.run_sync(
            datums_of, groups, options.advantage, spec.max_length
        )
        usage = _usage(groups)
        seconds = time.monotonic() - began
        batch = Batch(groups, weights_step, datums, too_long, usage, seconds)
        return batch, _bill(usage, options)

    async def evaluated(
        self, sampler: asyncio.Task[tinker.SamplingClient]
    ) -> tuple[dict[str, float], Bill]:
        """What one answer to each held-out prompt earns, and what they cost."""
        client = await asyncio.shield(sampler)
        groups = await self._rolled(self.source.held_out(), client, "eval")
        numbers = {f"test/{name}": value for name, value in numbers_of(groups).items()}
        return numbers, _bill(_usage(groups), options_of(self.attempt.spec))

    def check(self, batch: Batch) -> None:
        """Whether samples get rewards at all.

        Raises:
            InvalidInputError: For too long they have not: training on would be for nothing.
        """
        self.unscored = self.unscored + 1 if batch.is_unscored else 0
        if self.unscored >= _UNSCORED_LIMIT:
            raise InvalidInputError(
                f"In {self.unscored} steps in a row no sample has a reward: "
                f"{batch.left_out[0][:400]}",
                next_step="Mend the reward (test_reward tries it), then call resume_run.",
            )

    async def _rolled(
        self, groups: Sequence[Any], client: tinker.SamplingClient, step: int | str
    ) -> list[Rolled]:
        spec, options = self.attempt.spec, options_of(self.attempt.spec)

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


def _bound(groups: Sequence[Any], options: RlOptions) -> Bill:
    """At most so much for groups; of an environment, whose turns are its own, for one turn."""
    own = [group for group in groups if isinstance(group, PromptGroup)]
    others = len(groups) - len(own)
    samples = sum(group.group_size for group in own) + others * options.group_size
    prefill = sum(group.model_input.length * group.group_size for group in own)
    return _bill(Usage(prefill=prefill, sampled=samples * options.max_tokens), options)


def _usage(groups: Sequence[Rolled]) -> Usage:
    whole = Usage()
    for group in groups:
        whole.add(group.usage)
    return whole


def _bill(usage: Usage, options: RlOptions) -> Bill:
    return Bill(round(usage.prefill) + usage.sampled, usage.usd(options))


# The step itself


@dataclass
class _Training:
    """What is done with a batch."""

    options: RlOptions
    alarm: KlAlarm

    async def penalize(
        self, attempt: Attempt, batch: Batch, reference: tinker.SamplingClient
    ) -> None:
        """Take the penalty for leaving the start from the advantages, token by token."""
        from tinker_cookbook.rl.metrics import incorporate_kl_penalty

        price = self.options.prefill_usd_per_million or 0.0
        tokens = positions(batch.datums)
        attempt.journal.spend(tokens, tokens * price / 1e6)
        scorer: Any = CookbookScorer(reference)
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
        self.alarm.look(found["optim/kl_sample_train_v2"], step)
        return found


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


def _tell(attempt: Attempt, batch: Batch, step: int, renderer: ModelRenderer) -> None:
    """Keep some samples of a batch in words, and note why others have no reward."""
    count = options_of(attempt.spec).transcripts
    lines = transcripts.chosen(batch.groups, count, step, renderer)
    if batch.left_out:
        why = batch.left_out[0]
        lines.append({"step": step, "error": why[:1000]})
        attempt.journal.note(
            f"Step {step}: {len(batch.left_out)} samples have no reward and are left out: "
            f"{why[:300]}"
        )
    try:
        transcripts.append(_transcripts(attempt), lines)
    except OSError as error:  # a full disk ends no run
        attempt.journal.warn(f"Transcripts cannot be written: {error.strerror or error}.")


def _transcripts(attempt: Attempt) -> Path:
    return transcripts.path_in(attempt.journal.folder.path)
