"""Supervised fine-tuning (SFT) of a LoRA on conversations: the loop, in full.

The data is a file of conversations (JSONL, JSON, CSV or Parquet), one a row:
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
Before and after, the loss is measured on rows that are kept aside, and some are answered.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tinker
from tinker_cookbook.supervised.common import compute_mean_nll
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp import scripting
from tinker_mcp.scripting import tell, tokens
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of
from tinker_mcp.training.marking import marked


def parsed() -> argparse.Namespace:
    options = scripting.training_parser(__doc__, steps=20, learning_rate=None, name="sft")
    options.add_argument("--data", type=Path, help="default: 128 conversations of the cookbook")
    options.add_argument("--batch-size", type=int, default=8, help="conversations a step")
    options.add_argument("--max-length", type=int, default=512, help="tokens; longer ones are cut")
    options.add_argument("--eval-share", type=float, default=0.125, help="kept for evaluation")
    options.add_argument("--samples", type=int, default=3, help="of the kept rows, to answer")
    options.add_argument("--max-tokens", type=int, default=40, help="of such an answer")
    options.add_argument("--ttl-s", type=int, default=604_800, help="the checkpoint's life: 7 days")
    return options.parse_args()


def mean_nll(output: tinker.ForwardBackwardOutput, datums: list[tinker.Datum]) -> float:
    """Nats a trained token; every conversation counts the same, by its weights."""
    logprobs = [found["logprobs"] for found in output.loss_fn_outputs]
    return compute_mean_nll(logprobs, [datum.loss_fn_inputs["weights"] for datum in datums])


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate = scripting.learning_rate(args)
    scripting.checked(args, "steps", "batch_size", "rank", "max_tokens", rate=rate)
    rows = [row.messages for row in scripting.examples(args.data or scripting.example_data())]
    opened = scripting.open_model(args.base_model)
    model = opened.model

    # Rendered, the assistant's tokens weighted, and shifted: position t predicts token t+1.
    kept = split(rows, args.eval_share, args.seed)
    train, held_out = (
        [conversation_to_datum(messages, model.renderer, args.max_length) for messages in side]
        for side in kept
    )
    batches = [batch_of(train, args.batch_size, step, args.seed) for step in range(args.steps)]
    prompts = [model.prompt(messages[:-1]) for messages in kept[1][: args.samples]]
    trained = sum(map(tokens, batches)) + 2 * tokens(held_out)
    prefill = 2 * sum(prompt.length for prompt in prompts)
    sampled = 2 * len(prompts) * args.max_tokens  # at most
    plan = opened.plan(
        train=len(train),
        held_out=len(held_out),
        steps=args.steps,
        epochs=round(args.steps * args.batch_size / len(train), 1),
        learning_rate=rate,
        tokens_max=trained + prefill + sampled,
        usd_max=opened.usd(trained, prefill, sampled),
    )
    if args.dry_run:
        return plan | {"first_row": marked(train[0], model)}

    service = opened.service()
    opening = service.create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed)
    client = opening.result()
    params = tinker.SamplingParams(
        max_tokens=args.max_tokens, temperature=0.0, stop=model.stop(), seed=args.seed
    )

    def submit(step: int) -> tuple[Any, Any]:
        adam = tinker.AdamParams(learning_rate=rate * (1 - step / args.steps))  # linear decay
        return client.forward_backward(batches[step], "cross_entropy"), client.optim_step(adam)

    base = service.create_sampling_client(base_model=args.base_model).result()
    asked_before = [base.sample(prompt, 1, params) for prompt in prompts]
    before = client.forward(held_out, "cross_entropy") if held_out else None
    losses = []
    requests = submit(0)
    for step, batch in enumerate(batches):
        # The next step is submitted before this one is awaited: no clock cycle passes empty.
        upcoming = submit(step + 1) if step + 1 < args.steps else ()
        output, _ = (request.result() for request in requests)
        losses.append(mean_nll(output, batch))
        tell(f"step {step + 1}/{args.steps}  nll {losses[-1]:.4f}")
        requests = upcoming
    after = client.forward(held_out, "cross_entropy") if held_out else None
    state = client.save_state(args.name, ttl_seconds=args.ttl_s)  # weights and Adam: to resume
    saved = client.save_weights_for_sampler(args.name, ttl_seconds=args.ttl_s)  # to sample
    tuned = service.create_sampling_client(model_path=saved.result().path).result()
    asked_after = [tuned.sample(prompt, 1, params) for prompt in prompts]
    answers = []
    for messages, *asked in zip(kept[1], asked_before, asked_after, strict=False):
        found = (model.answer(request.result().sequences[0].tokens) for request in asked)
        first, then = (text if is_whole else f"{text} [cut]" for text, is_whole in found)
        question = messages[-2]["content"] if len(messages) > 1 else ""
        answers.append({"prompt": question, "before": first, "after": then})
        tell(answers[-1])
    return plan | {
        "losses": losses,
        "held_out_nll_before": before and mean_nll(before.result(), held_out),
        "held_out_nll_after": after and mean_nll(after.result(), held_out),
        "answers": answers,
        "state_path": state.result().path,
        "sampler_path": saved.result().path,
    }


if __name__ == "__main__":
    scripting.main(run, parsed())
