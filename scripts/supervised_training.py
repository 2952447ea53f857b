"""Supervised fine-tuning (SFT) of a LoRA on conversations: the loop, in full.

The data is a file of conversations (JSONL, JSON, CSV or Parquet), one a row:
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tinker
from _backend import CONVERSATIONS, checked, examples, main, open_model, parser, tell, tokens
from tinker_cookbook.supervised.common import compute_mean_nll
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp.training import models
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of


def parsed() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=CONVERSATIONS, help="128 conversations")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--batch-size", type=int, default=8, help="conversations a step")
    options.add_argument("--learning-rate", type=float, help="default: the cookbook's advice")
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--max-length", type=int, default=512, help="tokens; longer ones are cut")
    options.add_argument("--eval-share", type=float, default=0.125, help="kept for evaluation")
    options.add_argument("--name", default="sft", help="of the checkpoint")
    options.add_argument("--ttl-s", type=int, default=604_800, help="the checkpoint's life: 7 days")
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


def mean_nll(output: tinker.ForwardBackwardOutput, datums: list[tinker.Datum]) -> float:
    """Nats a trained token; every conversation counts the same, by its weights."""
    logprobs = [found["logprobs"] for found in output.loss_fn_outputs]
    return compute_mean_nll(logprobs, [datum.loss_fn_inputs["weights"] for datum in datums])


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate = args.learning_rate or float(models.learning_rate(args.base_model).value)
    checked(args, "steps", "batch_size", "rank", rate=rate)
    conversations = examples(args.data)
    opened = open_model(args.base_model)

    # Rendered, the assistant's tokens weighted, and shifted: position t predicts token t+1.
    train, held_out = (
        [conversation_to_datum(c.messages, opened.model.renderer, args.max_length) for c in side]
        for side in split(conversations, args.eval_share, args.seed)
    )
    batches = [batch_of(train, args.batch_size, step, args.seed) for step in range(args.steps)]
    billed = sum(map(tokens, batches)) + 2 * tokens(held_out)
    plan = opened.facts() | {
        **{"train": len(train), "held_out": len(held_out), "steps": args.steps},
        **{"learning_rate": rate, "tokens": billed, "usd": opened.usd(train=billed)},
    }
    tell("plan:", plan)
    if args.dry_run:
        return plan

    client = (
        opened.service()
        .create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed)
        .result()
    )

    def submit(step: int) -> tuple[Any, Any]:
        adam = tinker.AdamParams(learning_rate=rate * (1 - step / args.steps))  # linear decay
        return client.forward_backward(batches[step], "cross_entropy"), client.optim_step(adam)

    before = client.forward(held_out, "cross_entropy") if held_out else None
    losses = []
    requests = submit(0)
    for step, batch in enumerate(batches):
        # The next step is submitted before this one is awaited: no clock cycle passes empty.
        upcoming = submit(step + 1) if step + 1 < args.steps else None
        output, _ = (request.result() for request in requests)
        losses.append(mean_nll(output, batch))
        tell(f"step {step + 1}/{args.steps}  nll {losses[-1]:.4f}")
        requests = upcoming or requests
    after = client.forward(held_out, "cross_entropy") if held_out else None
    state = client.save_state(args.name, ttl_seconds=args.ttl_s)  # weights and Adam: to resume
    sampler = client.save_weights_for_sampler(args.name, ttl_seconds=args.ttl_s)  # to sample
    return plan | {
        "losses": losses,
        "held_out_nll_before": before and mean_nll(before.result(), held_out),
        "held_out_nll_after": after and mean_nll(after.result(), held_out),
        "state_path": state.result().path,
        "sampler_path": sampler.result().path,
    }


if __name__ == "__main__":
    main(run, parsed())
