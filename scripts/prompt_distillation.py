"""Prompt distillation: train a model to answer as if it had read a long prompt, without the prompt.

The model itself, given the prompt, answers each question (that is the data); then it is trained on
question and answer alone. Afterwards the prompt costs nothing, and cannot be leaked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tinker
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp import scripting
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of

PROMPT = (
    "You are Captain Salt, an old sailor. You answer every question in one short sentence, "
    "correctly, and you always begin with the word Ahoy."
)


def parsed() -> argparse.Namespace:
    options = scripting.training_parser(
        __doc__, steps=16, learning_rate=None, name="prompt-distilled"
    )
    options.add_argument("--prompt", type=Path, help="a text file; default: an old sailor")
    options.add_argument("--data", type=Path, help="whose questions; default: the cookbook's")
    options.add_argument("--questions", type=int, default=48)
    options.add_argument("--max-tokens", type=int, default=40, help="of an answer")
    options.add_argument("--batch-size", type=int, default=8, help="answers a step")
    return options.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate = scripting.learning_rate(args)
    scripting.checked(args, "questions", "max_tokens", "steps", "batch_size", "rank", rate=rate)
    if args.prompt and not args.prompt.is_file():
        raise InvalidInputError(f"There is no file {args.prompt}.", next_step="Give another.")
    text = args.prompt.read_text().strip() if args.prompt else PROMPT
    system = {"role": "system", "content": text}
    asked = [
        [message for message in one.messages if message["role"] == "user"][:1]
        for one in scripting.examples(args.data or scripting.example_data())
    ]
    questions = [question for question in asked if question][: args.questions]
    opened = scripting.open_model(args.base_model)
    model = opened.model
    prompts = [model.prompt([system, *question]) for question in questions]
    prefill = sum(prompt.length for prompt in prompts)
    sampled = (len(prompts) + 3) * args.max_tokens  # at most
    longest = max(prompt.length for prompt in prompts) + args.max_tokens
    trained = args.steps * args.batch_size * longest  # at most
    plan = opened.plan(
        questions=len(questions),
        steps=args.steps,
        learning_rate=rate,
        tokens_max=prefill + sampled + trained,
        usd_max=opened.usd(trained, prefill, sampled),
    )
    if args.dry_run:
        return plan

    service = opened.service()
    params = tinker.SamplingParams(max_tokens=args.max_tokens, stop=model.stop(), temperature=0.0)
    base = service.create_sampling_client(base_model=args.base_model).result()
    requests = [base.sample(prompt, 1, params) for prompt in prompts]  # all before the first wait
    answers = [model.answer(request.result().sequences[0].tokens)[0] for request in requests]
    scripting.tell(f"{len(answers)} answers; the first: {answers[0]!r}")
    lessons = [
        [*question, {"role": "assistant", "content": answer}]  # the prompt is left out
        for question, answer in zip(questions, answers, strict=True)
    ]
    learnt, held_out = split(lessons, 1 / 8, args.seed)
    train, test = (
        [conversation_to_datum(messages, model.renderer, None) for messages in side]
        for side in (learnt, held_out)
    )
    opening = service.create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed)
    client = opening.result()

    def submit(step: int) -> tuple[Any, Any]:
        batch = batch_of(train, args.batch_size, step, args.seed)
        adam = tinker.AdamParams(learning_rate=rate * (1 - step / args.steps))
        return client.forward_backward(batch, "cross_entropy"), client.optim_step(adam)

    before = client.forward(test, "cross_entropy")
    losses = []
    pending = submit(0)
    for step in range(args.steps):
        upcoming = submit(step + 1) if step + 1 < args.steps else ()  # before this is awaited
        output, _ = (request.result() for request in pending)
        losses.append(output.metrics["loss:sum"] / args.batch_size)  # an answer's weights sum to 1
        scripting.tell(f"step {step + 1}/{args.steps}  nll {losses[-1]:.4f}")
        pending = upcoming
    after = client.forward(test, "cross_entropy")
    paths = scripting.saved(client, args.name)
    distilled = service.create_sampling_client(model_path=paths["sampler_path"]).result()
    asking = [distilled.sample(model.prompt(one[:-1]), 1, params) for one in held_out[:3]]
    shown = [model.answer(request.result().sequences[0].tokens)[0] for request in asking]
    for question, answer in zip(held_out, shown, strict=False):
        scripting.tell(f"{question[0]['content']} -> {answer!r}")
    found = {
        "losses": losses,
        "held_out_nll_before": before.result().metrics["loss:sum"] / len(test),
        "held_out_nll_after": after.result().metrics["loss:sum"] / len(test),
        "answers_without_prompt": shown,
    }
    return plan | found | paths


if __name__ == "__main__":
    scripting.main(run, parsed())
