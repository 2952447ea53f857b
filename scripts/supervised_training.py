"""Supervised fine-tuning (SFT) of a LoRA on conversations: the loop, in full.

Without TINKER_API_KEY it trains on this machine, by tinker-local. The data is a file of conversations
(JSONL, JSON, CSV or Parquet): {"messages": [{"role": ..., "content": ...}]} or a layout like it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import tinker
from tinker_cookbook.supervised.common import compute_mean_nll
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp.errors import InvalidInputError, TinkerMcpError
from tinker_mcp.settings import Settings
from tinker_mcp.training import datasets, models, prices, rendering, sdk_errors, sessions
from tinker_mcp.training.backend import Backend, BackendConnector
from tinker_mcp.training.loop import batch_of

BUILT_IN = str(resources.files("tinker_cookbook") / "example_data" / "conversations.jsonl")
FREE = prices.Price(0.0, "the local backend", "", prefill=0.0, sample=0.0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=BUILT_IN, help="default: 128 conversations")
    parser.add_argument("--base-model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="conversations a step")
    parser.add_argument("--learning-rate", type=float, help="default: the cookbook's advice")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=512, help="tokens; longer ones are cut")
    parser.add_argument("--eval-share", type=float, default=0.125, help="kept aside for evaluation")
    parser.add_argument("--name", default="sft", help="of the checkpoint")
    parser.add_argument("--ttl-s", type=int, default=604_800, help="the checkpoint's life: 7 days")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="check all, show the cost, and end")
    parser.add_argument("--json", action="store_true", help="the result as one line of JSON")
    return parser.parse_args()


def opened(base_model: str) -> tuple[Backend, rendering.ModelRenderer, prices.Price | None]:
    """The backend (hosted with TINKER_API_KEY, else local, started if need be), and a model on it."""
    settings = Settings.from_environment(os.environ)
    connector = BackendConnector(dataclasses.replace(settings, call_limit_s=900.0))  # a download
    with contextlib.redirect_stdout(sys.stderr):
        backend = asyncio.run(connector.connect())
    offered = sessions.rest_client(backend).get_server_capabilities().result().supported_models
    served = [str(model.model_name) for model in offered if model.trainable is not False]
    if base_model not in served:
        problem, fix = models.absent(base_model, served)
        raise InvalidInputError(f"{problem}.", next_step=fix)
    price = FREE if backend.kind == "local" else prices.price(base_model, settings.home)
    return backend, rendering.load(backend, base_model, None), price


def examples(path: Path, kind: str) -> list[Any]:
    found, problems = datasets.read_file(path, str(path), kind)
    if problems:
        what = f"{len(problems)} rows of {path} cannot be used; the first: {problems[0]}."
        raise InvalidInputError(what, next_step="Mend or remove them.")
    return found


def mean_nll(output: tinker.ForwardBackwardOutput, datums: list[tinker.Datum]) -> float:
    """Nats a trained token, every conversation counting the same."""
    logprobs = [found["logprobs"] for found in output.loss_fn_outputs]
    return compute_mean_nll(logprobs, [datum.loss_fn_inputs["weights"] for datum in datums])


def run(args: argparse.Namespace) -> dict[str, Any]:
    conversations = examples(args.data, "supervised")
    backend, model, price = opened(args.base_model)
    rate = args.learning_rate or float(models.learning_rate(args.base_model).value)
    if min(args.steps, args.batch_size, args.rank) < 1 or not 0 < rate < 1e-2:
        what = f"steps {args.steps}, batch size {args.batch_size}, rank {args.rank}, rate {rate}: "
        raise InvalidInputError(f"{what}one is out of range.", next_step="Try a rate of 3e-4.")

    # Renders, weighs the assistant's tokens alone, and shifts: position t predicts token t+1.
    train, held_out = (
        [conversation_to_datum(one.messages, model.renderer, args.max_length) for one in side]
        for side in datasets.split(conversations, args.eval_share, args.seed)
    )
    batches = [batch_of(train, args.batch_size, step, args.seed) for step in range(args.steps)]
    tokens = sum(d.model_input.length for batch in [*batches, held_out, held_out] for d in batch)
    plan = {
        **{"backend": backend.label, "base_model": args.base_model, "renderer": model.name},
        **{"train": len(train), "held_out": len(held_out), "steps": args.steps},
        **{"learning_rate": rate, "tokens": tokens},
        "usd": None if price is None else tokens * price.train / 1e6,  # None: unknown
    }
    print(f"plan: {plan}", file=sys.stderr)
    if args.dry_run:
        return plan

    service = sessions.open_service(backend)
    client = service.create_lora_training_client(
        args.base_model, rank=args.rank, seed=args.seed
    ).result()

    def submit(step: int) -> tuple[Any, Any]:
        adam = tinker.AdamParams(learning_rate=rate * (1 - step / args.steps))  # linear decay
        return client.forward_backward(batches[step], "cross_entropy"), client.optim_step(adam)

    before = client.forward(held_out, "cross_entropy") if held_out else None
    losses = []
    requests = submit(0)
    for step, batch in enumerate(batches):
        # The next step is submitted before this one is awaited: no clock cycle passes empty.
        upcoming = submit(step + 1) if step + 1 < args.steps else requests
        output, _ = (request.result() for request in requests)
        losses.append(mean_nll(output, batch))
        print(f"step {step + 1}/{args.steps}  nll {losses[-1]:.4f}", file=sys.stderr)
        requests = upcoming
    after = client.forward(held_out, "cross_entropy") if held_out else None
    state = client.save_state(args.name, ttl_seconds=args.ttl_s)  # weights and optimizer: to resume
    sampler = client.save_weights_for_sampler(args.name, ttl_seconds=args.ttl_s)  # to sample from
    return plan | {
        "losses": losses,
        "held_out_nll_before": before and mean_nll(before.result(), held_out),
        "held_out_nll_after": after and mean_nll(after.result(), held_out),
        "state_path": state.result().path,
        "sampler_path": sampler.result().path,
    }


if __name__ == "__main__":
    arguments = parsed()
    try:
        with sdk_errors.told():
            result = run(arguments)
    except TinkerMcpError as error:
        sys.exit(f"supervised_training: {error}")
    print(json.dumps(result) if arguments.json else "\n".join(f"{k}: {result[k]}" for k in result))
