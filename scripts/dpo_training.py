"""Direct preference optimization (DPO): raise the odds of chosen replies over rejected ones.

The data is a file of pairs, one a row: {"prompt": "...", "chosen": "...", "rejected": "..."}.
Without one, the cookbook's conversations are taken; a reply with a preamble is the rejected one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tinker
import torch
from tinker_cookbook.preference.train_dpo import compute_dpo_loss
from tinker_cookbook.renderers import TrainOnWhat
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp import scripting
from tinker_mcp.scripting import tell, tokens
from tinker_mcp.training import models
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of

LAST = TrainOnWhat.LAST_ASSISTANT_MESSAGE


def parsed() -> argparse.Namespace:
    options = scripting.training_parser(__doc__, steps=10, learning_rate=3e-4, name="dpo")
    options.add_argument("--data", type=Path, help="default: 128 pairs, see above")
    options.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    options.add_argument("--beta", type=float, default=0.1, help="how dear it is to move away")
    options.add_argument("--max-length", type=int, default=512, help="tokens; longer ones are cut")
    options.add_argument("--eval-share", type=float, default=0.125, help="kept for evaluation")
    return options.parse_args()


def weighted(datum: tinker.Datum, logprobs: torch.Tensor) -> torch.Tensor:
    """Sum of weight * log-probability over the (N,) positions: that of the reply, a scalar."""
    return (logprobs * datum.loss_fn_inputs["weights"].to_torch()).sum()


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate = scripting.learning_rate(args, models.dpo_learning_rate())
    scripting.checked(args, "steps", "batch_size", "rank", rate=rate)
    pairs = scripting.preferences(args.data)
    opened = scripting.open_model(args.base_model)

    def datum(messages: Any) -> tinker.Datum:
        """Weights 0 or 1, since DPO compares sums; only the last reply differs."""
        renderer = opened.model.renderer
        return conversation_to_datum(messages, renderer, args.max_length, LAST, reduction="none")

    train, held_out = (
        [(datum(pair.chosen), datum(pair.rejected)) for pair in side]
        for side in split(pairs, args.eval_share, args.seed)
    )
    batches = [
        [side for pair in batch_of(train, args.batch_size, step, args.seed) for side in pair]
        for step in range(args.steps)
    ]
    test = [side for pair in held_out for side in pair]  # chosen, rejected, chosen, rejected ...
    # A custom loss is a forward pass and a forward_backward; the references are a pass over all.
    everything = list({id(d): d for batch in [*batches, test] for d in batch}.values())
    billed = 2 * sum(map(tokens, batches)) + tokens(everything) + tokens(test)
    plan = opened.plan(
        train=len(train),
        held_out=len(held_out),
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

    def logprobs_of(data: list[tinker.Datum]) -> list[torch.Tensor]:
        found = client.forward(data, "cross_entropy").result().loss_fn_outputs
        return [output["logprobs"].to_torch() for output in found]

    # A client that has not learnt yet is the reference model.
    scores = map(weighted, everything, logprobs_of(everything))
    references = {id(datum): score for datum, score in zip(everything, scores, strict=True)}

    def dpo(data: list[tinker.Datum], logprobs: list[torch.Tensor]) -> Any:
        """The loss, a scalar, and its metrics; `data` are the very datums that were submitted."""
        sums, frozen = list(map(weighted, data, logprobs)), [references[id(d)] for d in data]
        return compute_dpo_loss(sums[::2], sums[1::2], frozen[::2], frozen[1::2], args.beta)

    def submit(step: int) -> tuple[Any, Any]:
        adam = tinker.AdamParams(learning_rate=rate * (1 - step / args.steps))
        return client.forward_backward_custom(batches[step], dpo), client.optim_step(adam)

    metrics = []
    requests = submit(0)
    for step in range(args.steps):
        upcoming = submit(step + 1) if step + 1 < args.steps else ()  # before this is awaited
        output, _ = (request.result() for request in requests)
        metrics.append({name: output.metrics[name] for name in ("dpo_loss", "accuracy", "margin")})
        tell(f"step {step + 1}/{args.steps} ", metrics[-1])
        requests = upcoming
    after = dpo(test, logprobs_of(test))[1] if test else {}
    tell("held out:", after)
    return plan | {"metrics": metrics, "held_out_after": after} | scripting.saved(client, args.name)


if __name__ == "__main__":
    scripting.main(run, parsed())
