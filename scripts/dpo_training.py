"""Direct preference optimization (DPO): raise the odds of chosen replies over rejected ones.

The data is a file of pairs, one a row: {"prompt": "...", "chosen": "...", "rejected": "..."}.
Without one, the cookbook's conversations are taken; a reply with a preamble is the rejected one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker
import torch
from _backend import checked, main, open_model, parser, preferences, tell, tokens
from tinker_cookbook.preference.train_dpo import compute_dpo_loss
from tinker_cookbook.renderers import TrainOnWhat
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp.training import models
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of


def parsed() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="default: 128 pairs, see above")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    options.add_argument("--learning-rate", type=float, help="default: the cookbook's, 1e-5")
    options.add_argument("--beta", type=float, default=0.1, help="how dear it is to move away")
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--max-length", type=int, default=512, help="tokens; longer ones are cut")
    options.add_argument("--eval-share", type=float, default=0.0625, help="kept for evaluation")
    options.add_argument("--name", default="dpo", help="of the checkpoint")
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


def weighted(datum: tinker.Datum, logprobs: torch.Tensor) -> torch.Tensor:
    """Sum of weight * log-probability over the (N,) positions: that of the reply, a scalar."""
    return (logprobs * datum.loss_fn_inputs["weights"].to_torch()).sum()


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate = args.learning_rate or float(models.dpo_learning_rate().value)
    checked(args, "steps", "batch_size", "rank", rate=rate)
    pairs = preferences(args.data)
    opened = open_model(args.base_model)

    def datum(messages: Any) -> tinker.Datum:
        """Weights 0 or 1, since DPO compares sums; only the last reply differs."""
        what = TrainOnWhat.LAST_ASSISTANT_MESSAGE
        return conversation_to_datum(
            messages, opened.model.renderer, args.max_length, what, reduction="none"
        )

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
    plan = opened.facts() | {
        **{"train": len(train), "held_out": len(held_out), "steps": args.steps},
        **{"learning_rate": rate, "tokens": billed, "usd": opened.usd(train=billed)},
    }
    tell("plan:", plan)
    if args.dry_run:
        return plan

    service = opened.service()
    client = service.create_lora_training_client(
        args.base_model, rank=args.rank, seed=args.seed
    ).result()
    # A client that has not learnt yet is the reference model.
    found = client.forward(everything, "cross_entropy").result().loss_fn_outputs
    references = {
        id(d): weighted(d, output["logprobs"].to_torch())
        for d, output in zip(everything, found, strict=True)
    }

    def loss_of(data: list[tinker.Datum]) -> Callable[..., Any]:
        frozen = [references[id(d)] for d in data]

        def dpo(data: list[tinker.Datum], logprobs: list[torch.Tensor]) -> Any:
            sums = [weighted(d, found) for d, found in zip(data, logprobs, strict=True)]
            return compute_dpo_loss(sums[::2], sums[1::2], frozen[::2], frozen[1::2], args.beta)

        return dpo

    def submit(step: int) -> tuple[Any, Any]:
        adam = tinker.AdamParams(learning_rate=rate * (1 - step / args.steps))
        data = batches[step]
        return client.forward_backward_custom(data, loss_of(data)), client.optim_step(adam)

    metrics = []
    requests = submit(0)
    for step in range(args.steps):
        upcoming = submit(step + 1) if step + 1 < args.steps else None  # before this is awaited
        output, _ = (request.result() for request in requests)
        metrics.append({name: output.metrics[name] for name in ("dpo_loss", "accuracy", "margin")})
        tell(f"step {step + 1}/{args.steps} ", metrics[-1])
        requests = upcoming or requests
    after: dict[str, float] = {}
    if test:
        scores = client.forward(test, "cross_entropy").result().loss_fn_outputs
        _, after = loss_of(test)(test, [score["logprobs"].to_torch() for score in scores])
    saved = client.save_weights_for_sampler(args.name, ttl_seconds=604_800)
    state = client.save_state(args.name, ttl_seconds=604_800)
    paths = {"sampler_path": saved.result().path, "state_path": state.result().path}
    return plan | {"metrics": metrics, "held_out": after} | paths


if __name__ == "__main__":
    main(run, parsed())
