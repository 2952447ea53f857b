"""Supervised fine-tuning: the next token of each trained position, cross_entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinker_mcp.runs.attempt import Attempt, Outcome, positions
from tinker_mcp.runs.kept import load_datums as load
from tinker_mcp.training.objectives import BackendLoss

if TYPE_CHECKING:
    import tinker

__all__ = ["LOSS", "load", "train"]

LOSS = "train_mean_nll"


async def train(attempt: Attempt) -> Outcome:
    """From the attempt's first step to its end."""
    mean_nll = BackendLoss("cross_entropy", {}).loss  # nats per unit of weight

    async with attempt.opened(LOSS) as client:

        def evaluate(step: int) -> None:
            attempt.put_evaluation(
                step,
                lambda datums: client.forward(datums, "cross_entropy"),
                lambda output: {"test/nll": mean_nll(output, attempt.held_out)},
            )

        step = attempt.first_step
        if step == 0:
            evaluate(step)
        while step < attempt.spec.steps:
            batch = attempt.batch(attempt.train, step + 1)
            if attempt.must_end(step + 1, positions(batch)):
                break
            step += 1
            attempt.journal.spend(positions(batch))

            # Both at once, and without waiting for the step before: see `pipeline`.
            requests = (
                client.forward_backward(batch, "cross_entropy"),
                client.optim_step(attempt.adam(step)),
            )

            def numbers(
                output: tinker.ForwardBackwardOutput, batch: list[tinker.Datum] = batch
            ) -> dict[str, float]:
                return {LOSS: mean_nll(output, batch)}

            attempt.put_step(step, batch, requests, numbers)
            if attempt.is_eval_due(step):
                evaluate(step)
            if attempt.is_save_due(step):
                attempt.put_checkpoint(client, step, ttl_s=attempt.spec.ttl_s)
            await attempt.room()
        return await attempt.end(client, step)
