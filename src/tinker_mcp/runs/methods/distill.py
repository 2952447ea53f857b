"""Distillation: the student comes to answer as its teacher does.

On-policy the student samples, the teacher scores its tokens, and the reverse KL of each token is
its advantage; sampling, scoring and training overlap as in rl. Off-policy the teacher answers the
prompts once, and the student learns that by sft.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs import transcripts
from tinker_mcp.runs.ahead import Ahead, Bill
from tinker_mcp.runs.attempt import Attempt, Outcome, positions
from tinker_mcp.runs.distill_options import DistillOptions
from tinker_mcp.runs.methods import sft
from tinker_mcp.runs.policy import teacher
from tinker_mcp.runs.policy.completer import Policy, Usage, seed_of
from tinker_mcp.runs.policy.drift import CookbookScorer, KlAlarm
from tinker_mcp.runs.policy.outcomes import numbers_of
from tinker_mcp.runs.policy.rollouts import PromptGroup, Rolled, load_cookbook, roll
from tinker_mcp.runs.policy.tasks import background, together
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.prompts import load_both as load
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.training import losses, rendering
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

__all__ = ["LOSS", "load", "train"]

LOSS = "teacher_kl"
"""Nats a token, on-policy; off-policy the loss is that of sft."""

FLOOR = 0.5
"""Of it: a student that is as good as its teacher has a KL that is noise around 0."""

_LOSS_FN: Any = "importance_sampling"
_TOLD = ("env/all/ac_tokens_per_turn", "env/all/ob_tokens_per_turn", "env/all/stop/length")


async def train(attempt: Attempt) -> Outcome:
    """From the attempt's first step to its end."""
    if options_of(attempt.spec).mode == "on_policy":
        return await on_policy(attempt)
    return await off_policy(attempt)


def options_of(spec: RunSpec) -> DistillOptions:
    """The options that a distillation has."""
    if spec.distill is None:
        raise ValueError(f"{spec.method} has no distill options")
    return spec.distill


async def off_policy(attempt: Attempt) -> Outcome:
    """The teacher answers what it has not answered yet; then its answers are an sft set."""
    spec, options = attempt.spec, options_of(attempt.spec)
    answers = await teacher.ask_for_all(attempt, options)
    if isinstance(answers, Outcome):
        return answers
    student = await _renderer(attempt)
    sides = []
    for name, rows in (("train", attempt.train), ("held_out", attempt.held_out)):
        given = answers.of(cast("teacher.SetName", name))
        made, left_out = await anyio.to_thread.run_sync(
            teacher.datums_of, cast("Any", rows), given, student, options, spec.max_length
        )
        sides.append(made)
        if left_out:
            attempt.journal.note(
                f"{left_out} of the teacher's {len(given)} {name} answers are left out: they are "
                "empty, too long, or cut by max_tokens and of another tokenizer."
            )
    attempt.train, attempt.held_out = sides
    if not attempt.train:
        raise InvalidInputError(
            "None of the teacher's answers can be learned: all are empty, or cut by "
            f"max_tokens={options.max_tokens} and of another tokenizer.",
            next_step="Call start_run with a higher max_tokens.",
        )
    return await sft.train(attempt)


async def on_policy(attempt: Attempt) -> Outcome:
    """The student samples, the teacher scores."""
    spec, options = attempt.spec, options_of(attempt.spec)
    behind = options.max_off_policy_steps
    told = transcripts.path_in(attempt.journal.folder.path)
    step = attempt.first_step
    transcripts.rewind(told, step)
    student = await _renderer(attempt)
    await anyio.to_thread.run_sync(load_cookbook)  # before a client is there to stand idle

    async with (
        teacher.opened(attempt, options) as scorer,
        attempt.opened(LOSS, floor=FLOOR) as client,
        background() as start,
    ):
        alarm = KlAlarm(attempt.journal, behind, options.temperature)
        scored = _Scored(attempt, options, student, CookbookScorer(scorer), alarm)
        ahead = Ahead(attempt, start, scored.bound, scored.batch)

        def new_sampler(kind: Any) -> asyncio.Task[tinker.SamplingClient]:
            return start(client.save_weights_and_get_sampling_client(kind=kind).coroutine())

        def evaluate(step: int) -> None:
            bound = scored.bound_of(attempt.held_out, 1)
            if not ahead.affords(bound):
                attempt.journal.warn(f"The evaluation at step {step} was left out: max_usd.")
                return
            # Not the in-flight weights, which will be others before all is sampled.
            work = scored.evaluation(new_sampler("snapshot"))
            attempt.put(
                ahead.paid(work, bound), lambda found: attempt.journal.evaluation(step, found)
            )

        sampler = new_sampler("inflight")  # one place for all, not one more each step
        ahead.go_on(step + 1 + behind, sampler, step)
        if step == 0 and attempt.held_out:
            evaluate(step)
        while step < spec.steps:
            batch = await ahead.next()
            tokens = positions(batch.datums) if batch else 0
            if attempt.must_end(step + 1, tokens) or batch is None:
                break
            step += 1
            attempt.journal.spend(tokens)
            transcripts.append(
                told, transcripts.chosen(batch.groups, options.transcripts, step, student)
            )
            requests = (
                client.forward_backward(losses.fitted(_LOSS_FN, batch.datums), _LOSS_FN),
                client.optim_step(attempt.adam(step)),
            )
            if ahead.needs_weights:
                sampler = new_sampler("inflight")
            attempt.put_step(step, batch.datums, requests, partial(scored.numbers, batch, step))
            ahead.go_on(step + 1 + behind, sampler, step)
            if attempt.held_out and attempt.is_eval_due(step):
                evaluate(step)
            if attempt.is_save_due(step):
                attempt.put_checkpoint(client, step, ttl_s=spec.ttl_s)
            await attempt.room()
        return await attempt.end(client, step)


async def _renderer(attempt: Attempt) -> ModelRenderer:
    spec = attempt.spec
    return await anyio.to_thread.run_sync(
        rendering.load, attempt.backend, spec.base_model, spec.renderer
    )


# What the student samples, scored by the teacher


@dataclass(frozen=True)
class Group:
    """Samples of one prompt; the reward of each is minus its reverse KL, in nats a token.

    Attributes:
        datums: With `mask`; the advantages are the teacher's.
        teacher_kl: Mean over `sampled` tokens.
    """

    rolled: Rolled
    datums: list[tinker.Datum]
    teacher_kl: float
    sampled: float
    scored_tokens: int


@dataclass(frozen=True)
class Batch:
    """What a step is trained on.

    Attributes:
        weights_step: The step whose weights sampled it.
        seconds: Until the last group was sampled and scored.
    """

    scored: Sequence[Group]
    weights_step: int
    seconds: float

    @property
    def groups(self) -> list[Rolled]:
        return [group.rolled for group in self.scored]

    @property
    def datums(self) -> list[tinker.Datum]:
        return [datum for group in self.scored for datum in group.datums]

    @property
    def usage(self) -> Usage:
        """Of sampling."""
        total = Usage()
        for group in self.scored:
            total.add(group.rolled.usage)
        return total

    @property
    def teacher_kl(self) -> float:
        """Reverse KL, nats a token."""
        sampled = sum(group.sampled for group in self.scored)
        return sum(group.teacher_kl * group.sampled for group in self.scored) / sampled

    def bill(self, options: DistillOptions) -> Bill:
        """What sampling and scoring cost."""
        return _bill(self.usage, sum(group.scored_tokens for group in self.scored), options)


@dataclass
class _Scored:
    """Samples of the student with the teacher's advantages."""

    attempt: Attempt
    options: DistillOptions
    student: ModelRenderer
    scorer: CookbookScorer
    alarm: KlAlarm

    def bound(self, step: int) -> Bill:
        """What the batch of a step costs at most."""
        return self.bound_of(self._prompts(step), self.options.group_size)

    def bound_of(self, rows: Sequence[Any], samples: int) -> Bill:
        """The same for so many samples of some prompts."""
        prompt = sum(PromptGroup(row, self.student, 1).model_input.length for row in rows)
        answers = len(rows) * samples * self.options.max_tokens
        usage = Usage(prefill=prompt * samples, sampled=answers)
        return _bill(usage, prompt * samples + answers, self.options)

    async def batch(
        self, step: int, client: tinker.SamplingClient, weights_step: int
    ) -> tuple[Batch, Bill]:
        """The batch of a step: each group is scored as soon as it is sampled."""
        batch = await self._batch(
            self._prompts(step), self.options.group_size, client, weights_step, step
        )
        return batch, batch.bill(self.options)

    async def evaluation(
        self, sampler: asyncio.Task[tinker.SamplingClient]
    ) -> tuple[dict[str, float], Bill]:
        """One answer to each held-out prompt."""
        rows: Any = self.attempt.held_out
        batch = await self._batch(rows, 1, await asyncio.shield(sampler), 0, "eval")
        numbers = {f"test/{LOSS}": batch.teacher_kl, "test/optim/entropy": batch.usage.entropy}
        return numbers, batch.bill(self.options)

    def numbers(
        self, batch: Batch, step: int, output: tinker.ForwardBackwardOutput
    ) -> dict[str, float]:
        """What a step is recorded with, under the cookbook's names."""
        from tinker_cookbook.rl.metrics import compute_kl_sample_train

        logprobs = [one["logprobs"].to_torch() for one in output.loss_fn_outputs]
        usage, all_numbers = batch.usage, numbers_of(batch.groups)
        drift = compute_kl_sample_train(batch.datums, logprobs)
        self.alarm.look(drift["optim/kl_sample_train_v2"], step)
        return {
            LOSS: batch.teacher_kl,
            **{name: all_numbers[name] for name in _TOLD},
            **drift,
            "off_policy_steps": step - 1 - batch.weights_step,
            "time/sampling": batch.seconds,
            "sampling/prefill_tokens": usage.prefill,
            "sampling/sampled_tokens": usage.sampled,
            "teacher/scored_tokens": sum(group.scored_tokens for group in batch.scored),
        }

    def _prompts(self, step: int) -> list[Prompt]:
        rows: Sequence[Prompt] = cast("Any", self.attempt.train)
        return self.attempt.batch(rows, step)

    async def _batch(
        self,
        rows: Sequence[Prompt],
        samples: int,
        client: tinker.SamplingClient,
        weights_step: int,
        what: int | str,
    ) -> Batch:
        began = time.monotonic()
        groups = await together(
            [
                partial(
                    self._group,
                    PromptGroup(row, self.student, samples),
                    self._policy(client, what, place),
                )
                for place, row in enumerate(rows)
            ]
        )
        return Batch(groups, weights_step, time.monotonic() - began)

    def _policy(self, client: tinker.SamplingClient, what: int | str, place: int) -> Policy:
        return Policy(
            client=client,
            max_tokens=self.options.max_tokens,
            temperature=self.options.temperature,
            seed=seed_of(self.attempt.spec.seed, what, place),
            context=self.attempt.spec.max_length,
        )

    async def _group(self, builder: PromptGroup, policy: Policy) -> Group:
        import torch
        from tinker_cookbook.distillation.train_on_policy import incorporate_kl_penalty
        from tinker_cookbook.rl.data_processing import assemble_training_data
        from tinker_cookbook.rl.types import TrajectoryGroup

        rolled = await roll(builder, policy)
        size = len(rolled.trajectories.trajectories_G)
        made, _ = assemble_training_data([rolled.trajectories], [torch.zeros(size)])
        scorers: Any = [self.scorer] * size
        # Each datum as a data set of its own, so that each one's KL is told.
        found = await incorporate_kl_penalty(
            made, scorers, list(range(size)), self.options.kl_coef, self.options.kl_discount
        )
        rewards = [-found.get(f"{LOSS}/dataset_{place}", 0.0) for place in range(size)]
        trajectories = TrajectoryGroup(
            rolled.trajectories.trajectories_G, rewards, rolled.trajectories.metrics_G
        )
        return Group(
            rolled=replace(rolled, trajectories=trajectories),
            datums=made,
            teacher_kl=found[LOSS],
            sampled=sum(float(one.loss_fn_inputs["mask"].to_numpy().sum()) for one in made),
            scored_tokens=positions(made) + len(made),
        )


def _bill(usage: Usage, scored_tokens: int, options: DistillOptions) -> Bill:
    """Of the student's sampling and the teacher's scoring, which is a prefill."""
    usd = scored_tokens * (options.teacher_prefill_usd_per_million or 0.0) / 1e6
    return Bill(round(usage.prefill) + usage.sampled + scored_tokens, usage.usd(options) + usd)
