"""Direct preference optimization: pairs, against the log-probabilities of the run's frozen start.

The loss is a custom one, computed here from the backend's log-probabilities: a step is a forward
pass, and only with its answer the backward pass. No pass of the next step can begin before this
step's optim_step, so on a clock a step costs two cycles, not one; overlapping saves the third that
a loop would need which submits the optim_step last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from tinker_mcp.runs.attempt import Attempt, Outcome, positions
from tinker_mcp.runs.kept import load_datums as load
from tinker_mcp.training import dpo
from tinker_mcp.training.dpo import PAIR, DpoLoss

if TYPE_CHECKING:
    import tinker

__all__ = ["LOSS", "load", "train"]

LOSS = "dpo_loss"
REFERENCES = "references.safetensors"
PASSES = 2
"""A step is billed twice: a forward pass, then a forward_backward."""


async def train(attempt: Attempt) -> Outcome:
    """From the attempt's first step to its end."""
    pairs = [attempt.train[at : at + PAIR] for at in range(0, len(attempt.train), PAIR)]

    await anyio.to_thread.run_sync(dpo.load)  # seconds, in which a client would stand idle
    async with attempt.opened(LOSS) as client:
        loss = await _loss(attempt, client)
        if loss is None:
            return await attempt.end(client, attempt.first_step)

        def numbers(output: tinker.ForwardBackwardOutput) -> dict[str, float]:
            return {LOSS: loss.loss(output, ()), **loss.metrics(output)}

        def held_out_numbers(output: tinker.ForwardBackwardOutput) -> dict[str, float]:
            found = numbers(loss.scored(output, attempt.held_out))
            return {f"test/{name}": value for name, value in found.items()}

        def evaluate(step: int) -> None:
            attempt.put_evaluation(
                step, lambda datums: client.forward(datums, "cross_entropy"), held_out_numbers
            )

        step = attempt.first_step
        if step == 0:
            evaluate(step)
        while step < attempt.spec.steps:
            batch = [datum for pair in attempt.batch(pairs, step + 1) for datum in pair]
            if attempt.must_end(step + 1, PASSES * positions(batch)):
                break
            step += 1
            attempt.journal.spend(PASSES * positions(batch))

            # The SDK keeps the place of both passes in the line, so the optim_step can follow.
            requests = (
                client.forward_backward_custom(batch, loss.function(batch)),
                client.optim_step(attempt.adam(step)),
            )
            attempt.put_step(step, batch, requests, numbers)
            if attempt.is_eval_due(step):
                evaluate(step)
            if attempt.is_save_due(step):
                attempt.put_checkpoint(client, step, ttl_s=attempt.spec.ttl_s)
            await attempt.room()
        return await attempt.end(client, step)


async def _loss(attempt: Attempt, client: tinker.TrainingClient) -> DpoLoss | None:
    """The loss on this run's pairs, with the references that an earlier attempt left if it did.

    None where they are still to be computed, and max_usd does not allow it.
    """
    datums = [*attempt.train, *attempt.held_out]
    cache = attempt.journal.folder.train_data.with_name(REFERENCES)
    key = _key(attempt)
    references = await anyio.to_thread.run_sync(_read, cache, key)
    if references is None:
        if attempt.must_not_spend("The pass for the references", positions(datums)):
            return None
        attempt.journal.spend(positions(datums))
        references = await _references(attempt, client, datums)
        await anyio.to_thread.run_sync(_write, cache, key, references)
    known = zip(datums, references, strict=True)
    return DpoLoss(attempt.spec.beta or 0.1, {id(datum): found for datum, found in known})


async def _references(
    attempt: Attempt, client: tinker.TrainingClient, datums: list[tinker.Datum]
) -> Sequence[float]:
    """Sum of weight * log-probability of each datum under the weights the run began with."""
    if attempt.first_step == 0:  # the client has them still
        output = await attempt.answer(client.forward(datums, "cross_entropy").coroutine())
        return dpo.references_of(output, datums)
    async with attempt.frozen_start() as frozen:
        output = await attempt.answer(frozen.forward(datums, "cross_entropy").coroutine())
    return dpo.references_of(output, datums)


def _key(attempt: Attempt) -> dict[str, str]:
    """What the references are of: the datums and the weights."""
    spec = attempt.spec
    return {
        "train": spec.train.sha256,
        "held_out": spec.held_out.sha256 if spec.held_out else "",
        "start": spec.checkpoint or spec.base_model,
    }


def _read(cache: Path, key: Mapping[str, str]) -> Sequence[float] | None:
    """References of this key, or None where there are none."""
    from safetensors import safe_open

    if not cache.exists():
        return None
    with safe_open(cache, framework="numpy") as kept:
        if kept.metadata() != key:
            return None
        found: list[float] = kept.get_tensor("references").tolist()  # (datums,) float64, nats
        return found


def _write(cache: Path, key: Mapping[str, str], references: Sequence[float]) -> None:
    """Whole or not at all."""
    import numpy as np
    from safetensors.numpy import save_file

    partial = cache.with_suffix(f".{os.getpid()}.partial")
    save_file({"references": np.array(references, dtype=np.float64)}, partial, dict(key))
    partial.replace(cache)
