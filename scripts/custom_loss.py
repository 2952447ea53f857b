"""Train on a loss of your own, written in torch: here the focal loss, -(1 - p)^gamma log p.

The SDK asks for log-probabilities, differentiates your function on this machine, and sends the
gradient: a step costs a forward pass more. With --gamma 0 it is cross_entropy, which is checked
first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker
import torch
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp import scripting
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.loop import batch_of


def parsed() -> argparse.Namespace:
    options = scripting.training_parser(__doc__, steps=8, learning_rate=None, name="custom-loss")
    options.add_argument("--data", type=Path, help="default: 128 conversations of the cookbook")
    options.add_argument("--gamma", type=float, default=1.0, help="0 up; how little ease counts")
    options.add_argument("--batch-size", type=int, default=4, help="conversations a step")
    options.add_argument("--max-length", type=int, default=512, help="tokens; longer ones are cut")
    return options.parse_args()


def focal(gamma: float) -> Callable[..., tuple[torch.Tensor, dict[str, float]]]:
    """A loss for `forward_backward_custom`."""

    def loss(
        data: list[tinker.Datum], logprobs_D: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """From one (N,) tensor of log-probabilities a datum, to a scalar and metrics.

        It must not raise, and must depend on each tensor: a failure poisons the client for good.
        """
        terms, plain = [], []  # scalars
        for datum, logprobs in zip(data, logprobs_D, strict=True):
            weights = datum.loss_fn_inputs["weights"].to_torch()  # (N,), sums to 1
            ease = torch.exp(logprobs)
            terms.append(-(weights * (1 - ease) ** gamma * logprobs).sum())
            plain.append(-(weights * logprobs).sum())
        losses, nlls = torch.stack(terms), torch.stack(plain)  # (D,) each
        return losses.sum(), {"nll": nlls.mean().item(), "focal": losses.mean().item()}

    return loss


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate = scripting.learning_rate(args)
    scripting.checked(args, "steps", "batch_size", "rank", rate=rate)
    if args.gamma < 0:
        raise InvalidInputError(f"--gamma {args.gamma} is below 0.", next_step="Try 1.")
    rows = scripting.examples(args.data or scripting.example_data())
    opened = scripting.open_model(args.base_model)
    renderer = opened.model.renderer
    datums = [conversation_to_datum(row.messages, renderer, args.max_length) for row in rows]
    batches = [batch_of(datums, args.batch_size, step, args.seed) for step in range(args.steps)]
    billed = 2 * sum(map(scripting.tokens, batches)) + scripting.tokens(batches[0])
    plan = opened.plan(
        gamma=args.gamma,
        steps=args.steps,
        learning_rate=rate,
        tokens=billed,
        usd=opened.usd(train=billed),
    )
    if args.dry_run:
        return plan

    service = opened.service()
    opening = service.create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed)
    client = opening.result()

    # On one batch, before any step: with gamma 0 it must be what the service computes itself.
    theirs = client.forward(batches[0], "cross_entropy").result()
    logprobs = [found["logprobs"].to_torch() for found in theirs.loss_fn_outputs]
    ours, _ = focal(0.0)(batches[0], logprobs)
    difference = abs(float(ours) - theirs.metrics["loss:sum"])
    scripting.tell(f"gamma 0 against cross_entropy: they differ by {difference:.1e}")

    def submit(step: int) -> tuple[Any, Any]:
        adam = tinker.AdamParams(learning_rate=rate * (1 - step / args.steps))
        loss = client.forward_backward_custom(batches[step], focal(args.gamma))
        return loss, client.optim_step(adam)  # the SDK keeps the place of both passes in the line

    metrics = []
    requests = submit(0)
    for step in range(args.steps):
        upcoming = submit(step + 1) if step + 1 < args.steps else ()  # before this is awaited
        output, _ = (request.result() for request in requests)
        metrics.append({name: output.metrics[name] for name in ("nll", "focal")})
        scripting.tell(f"step {step + 1}/{args.steps} ", metrics[-1])
        requests = upcoming
    found = {"difference_from_cross_entropy": difference, "metrics": metrics}
    return plan | found | scripting.saved(client, args.name)


if __name__ == "__main__":
    scripting.main(run, parsed())
