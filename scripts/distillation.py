"""On-policy distillation: the student answers, the teacher scores each token, the student learns.

The advantage of a token is how much likelier the teacher finds it than the student did: the
negative of the reverse KL. Both must have one tokenizer. Without --teacher, one is fine-tuned
first, here.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import tinker
from _backend import (
    CONVERSATIONS,
    answer_datum,
    checked,
    examples,
    main,
    open_model,
    parser,
    tell,
    tokens,
)
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import models
from tinker_mcp.training.loop import batch_of


def parsed() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--teacher", help="tinker:// sampler path, or a base model's name")
    options.add_argument("--teacher-steps", type=int, default=10, help="of one that is made here")
    options.add_argument("--data", type=Path, default=CONVERSATIONS, help="whose prompts are taken")
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--batch-size", type=int, default=8, help="prompts a step")
    options.add_argument("--group-size", type=int, default=2, help="answers to each")
    options.add_argument("--max-tokens", type=int, default=32)
    options.add_argument("--learning-rate", type=float, help="default: the cookbook's advice")
    options.add_argument("--name", default="distilled", help="of the checkpoint")
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate = args.learning_rate or float(models.learning_rate(args.base_model).value)
    checked(args, "steps", "teacher_steps", "batch_size", "group_size", "max_tokens", rate=rate)
    rows = [c.messages for c in examples(args.data)]
    opened = open_model(args.base_model)
    is_base = bool(args.teacher) and not args.teacher.startswith("tinker://")
    graded_by = open_model(args.teacher) if is_base else opened
    if graded_by.model.vocabulary_size != opened.model.vocabulary_size:
        what = f"{args.teacher} and {args.base_model} have different tokenizers."
        raise InvalidInputError(what, next_step="Take a teacher of the same family.")
    prompts = [opened.model.prompt(messages[:-1]) for messages in rows]
    lessons = [conversation_to_datum(messages, opened.model.renderer, 512) for messages in rows]
    taught = 0 if args.teacher else args.teacher_steps
    batches = [batch_of(prompts, args.batch_size, step, args.seed) for step in range(args.steps)]
    asked = sum(prompt.length for batch in batches for prompt in batch)
    sampled = args.steps * args.batch_size * args.group_size * args.max_tokens  # at most
    scored = asked * args.group_size + sampled
    of_teacher = sum(tokens(batch_of(lessons, 8, step, args.seed)) for step in range(taught))
    plan = opened.facts() | {
        **{"teacher": args.teacher or f"{args.base_model} after {taught} steps of SFT"},
        **{"steps": args.steps, "learning_rate": rate, "answers_tokens_max": sampled},
        "usd_max": total(opened.usd(of_teacher + scored, asked, sampled), graded_by.usd(0, scored)),
    }
    tell("plan:", plan)
    if args.dry_run:
        return plan

    service = opened.service()
    teacher_path = args.teacher or fine_tuned(service, args, lessons, rate)
    where = {"base_model": teacher_path} if is_base else {"model_path": teacher_path}
    teacher = service.create_sampling_client(**where).result()
    student = service.create_lora_training_client(args.base_model, seed=args.seed).result()
    params = tinker.SamplingParams(max_tokens=args.max_tokens, stop=opened.model.stop())
    adam = tinker.AdamParams(learning_rate=rate)
    sampler = student.save_weights_and_get_sampling_client().result()
    metrics = []
    for step, batch in enumerate(batches):
        answering = [sampler.sample(prompt, args.group_size, params) for prompt in batch]
        answers = [
            (prompt, sequence)
            for prompt, request in zip(batch, answering, strict=True)
            for sequence in request.result().sequences
        ]
        scoring = [teacher.compute_logprobs(whole(*answer)) for answer in answers]
        data, kl = [], 0.0
        for (prompt, sequence), request in zip(answers, scoring, strict=True):
            theirs = request.result()[prompt.length :]  # (N,), the teacher's, of the answer
            ours = list(sequence.logprobs or ())  # (N,), those it was sampled with
            advantages = [float(q or 0.0) - p for q, p in zip(theirs, ours, strict=True)]
            kl -= sum(advantages)
            data.append(answer_datum(prompt, sequence, advantages))
        # Step and new sampler are submitted together, then awaited.
        requests = student.forward_backward(data, "importance_sampling"), student.optim_step(adam)
        renewed = student.save_weights_and_get_sampling_client()
        for request in requests:
            request.result()
        sampler = renewed.result()
        metrics.append({"reverse_kl": kl / sum(len(s.tokens) for _, s in answers)})
        tell(f"step {step + 1}/{args.steps} ", metrics[-1])
    saved = student.save_weights_for_sampler(args.name, ttl_seconds=604_800).result()
    return plan | {"metrics": metrics, "teacher_path": teacher_path, "sampler_path": saved.path}


def total(*usd: float | None) -> float | None:
    return None if None in usd else sum(one or 0.0 for one in usd)


def whole(prompt: tinker.ModelInput, sequence: tinker.SampledSequence) -> tinker.ModelInput:
    return prompt.append(tinker.EncodedTextChunk(tokens=list(sequence.tokens)))


def fine_tuned(service: Any, args: argparse.Namespace, lessons: list[Any], rate: float) -> str:
    """A teacher: some steps of SFT, all submitted before the first is awaited."""
    client = service.create_lora_training_client(args.base_model, seed=args.seed + 1).result()
    requests: list[Any] = []
    for step in range(args.teacher_steps):
        requests.append(client.forward_backward(batch_of(lessons, 8, step, 0), "cross_entropy"))
        requests.append(client.optim_step(tinker.AdamParams(learning_rate=rate)))
    for done, request in enumerate(itertools.islice(requests, 0, None, 2), start=1):
        request.result()
        tell(f"teacher: step {done}/{args.teacher_steps}")
    return str(client.save_weights_for_sampler("teacher", ttl_seconds=604_800).result().path)


if __name__ == "__main__":
    main(run, parsed())
