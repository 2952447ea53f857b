"""Supervised fine-tuning (SFT) of a LoRA on conversations with images: the loop, in full.

The data is a file of conversations, one a line (JSONL). Content is text or a list of parts; an
image is the path of a file (relative to the data's folder), a data URL or an http(s) URL:
{"messages": [{"role": "user", "content": [{"type": "image", "image": "cats/1.png"},
                                           {"type": "text", "text": "What is this?"}]},
              {"role": "assistant", "content": "A cat."}]}
Without --data it trains on coloured shapes that are drawn on the spot.
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
from tinker_mcp.training import images
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of

TINY = "tinker-local/tiny-vl"  # random weights: it learns these shapes, and knows nothing else
TINY_RATE = 5e-3
LAST_REPLY = "last_assistant_message"


def parsed() -> argparse.Namespace:
    options = scripting.training_parser(__doc__, steps=60, learning_rate=None, name="vision")
    options.set_defaults(base_model=TINY)
    options.add_argument("--data", type=Path, help="default: 64 coloured shapes")
    options.add_argument("--batch-size", type=int, default=8, help="conversations a step")
    options.add_argument("--max-length", type=int, help="tokens; default: the model's context")
    options.add_argument("--eval-share", type=float, default=0.125, help="kept for evaluation")
    options.add_argument("--samples", type=int, default=4, help="of the kept rows, to answer")
    options.add_argument("--max-tokens", type=int, default=24, help="of such an answer")
    return options.parse_args()


def mean_nll(output: tinker.ForwardBackwardOutput, datums: list[tinker.Datum]) -> float:
    """Nats a trained token; every conversation counts the same, by its weights."""
    logprobs = [found["logprobs"] for found in output.loss_fn_outputs]
    return compute_mean_nll(logprobs, [datum.loss_fn_inputs["weights"] for datum in datums])


def run(args: argparse.Namespace) -> dict[str, Any]:
    is_tiny = args.learning_rate is None and args.base_model == TINY
    rate = TINY_RATE if is_tiny else scripting.learning_rate(args)
    scripting.checked(args, "steps", "batch_size", "rank", "max_tokens", rate=rate)
    rows = images.read(args.data) if args.data else images.coloured_shapes(64, args.seed)
    backend, offered = scripting.open_backend()
    images.check_model(args.base_model, [str(m.model_name) for m in offered], backend.hub_cache)
    opened = scripting.open_model(args.base_model)
    model = opened.model.reading_images()  # the renderer, with the model's image processor

    # An image becomes a tinker.ImageChunk: JPEG bytes and the number of tokens the model makes of
    # them. They count in the length and the cost, and carry no loss.
    datums = [conversation_to_datum(row, model.renderer, None, LAST_REPLY) for row in rows]
    images.check_lengths(datums, args.max_length or opened.context_length)  # none is cut
    train, held_out = split(datums, args.eval_share, args.seed)
    batches = [batch_of(train, args.batch_size, step, args.seed) for step in range(args.steps)]
    asked_rows = split(rows, args.eval_share, args.seed)[1][: args.samples]
    prompts = [model.prompt(messages[:-1]) for messages in asked_rows]
    trained = sum(map(tokens, batches)) + 2 * tokens(held_out)
    prefill, sampled = sum(p.length for p in prompts), len(prompts) * args.max_tokens  # at most
    plan = opened.plan(
        train=len(train),
        held_out=len(held_out),
        steps=args.steps,
        learning_rate=rate,
        tokens_max=trained + prefill + sampled,
        usd_max=opened.usd(trained, prefill, sampled),
    )
    if args.dry_run:
        return plan

    service = opened.service()
    opening = service.create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed)
    client = opening.result()

    def submit(step: int) -> tuple[Any, Any]:
        adam = tinker.AdamParams(learning_rate=rate * (1 - step / args.steps))  # linear decay
        return client.forward_backward(batches[step], "cross_entropy"), client.optim_step(adam)

    before = client.forward(held_out, "cross_entropy") if held_out else None
    losses = []
    # A step is submitted before the one ahead of it is awaited: no clock cycle passes empty.
    for step, output in enumerate(scripting.overlapped(submit, args.steps)):
        losses.append(mean_nll(output, batches[step]))
        tell(f"step {step + 1}/{args.steps}  nll {losses[-1]:.4f}")
    after = client.forward(held_out, "cross_entropy") if held_out else None
    paths = scripting.saved(client, args.name)
    tuned = service.create_sampling_client(model_path=paths["sampler_path"]).result()
    params = tinker.SamplingParams(max_tokens=args.max_tokens, temperature=0.0, stop=model.stop())
    asked = [tuned.sample(prompt, 1, params) for prompt in prompts]
    answers = [
        {"right": messages[-1]["content"], "said": model.answer(a.result().sequences[0].tokens)[0]}
        for messages, a in zip(asked_rows, asked, strict=True)
    ]
    tell("answers:", answers)
    return {
        **plan,
        **paths,
        "losses": losses,
        "held_out_nll_before": before and mean_nll(before.result(), held_out),
        "held_out_nll_after": after and mean_nll(after.result(), held_out),
        "answers": answers,
    }


if __name__ == "__main__":
    scripting.main(run, parsed())
