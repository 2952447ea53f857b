"""On-policy distillation: the student answers, the teacher scores each token, the student learns.

The advantage of a token is how much likelier the teacher finds it than the student did: the
negative of the reverse KL. Both must have one tokenizer. Without --teacher, one is fine-tuned
first, here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tinker
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp import scripting
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.scripting import tell, tokens
from tinker_mcp.training.loop import batch_of


def parsed() -> argparse.Namespace:
    options = scripting.training_parser(__doc__, steps=6, learning_rate=None, name="distilled")
    options.add_argument("--teacher", help="tinker:// sampler path, or a base model's name")
    options.add_argument("--teacher-steps", type=int, default=10, help="of one that is made here")
    options.add_argument("--data", type=Path, help="whose prompts to take; default: the cookbook's")
    options.add_argument("--batch-size", type=int, default=8, help="prompts a step")
    options.add_argument("--group-size", type=int, default=2, help="answers to each")
    options.add_argument("--max-tokens", type=int, default=32)
    return options.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate = scripting.learning_rate(args)
    counts = ("steps", "teacher_steps", "batch_size", "group_size", "max_tokens", "rank")
    scripting.checked(args, *counts, rate=rate)
    rows = [row.messages for row in scripting.examples(args.data or scripting.example_data())]
    opened = scripting.open_model(args.base_model)
    is_base = bool(args.teacher) and not args.teacher.startswith("tinker://")
    graded_by = scripting.open_model(args.teacher) if is_base else opened
    if graded_by.model.vocabulary_size != opened.model.vocabulary_size:
        what = f"{args.teacher} and {args.base_model} have different tokenizers."
        raise InvalidInputError(what, next_step="Take a teacher of the same family.")
    prompts = [opened.model.prompt(messages[:-1]) for messages in rows]
    batches = [batch_of(prompts, args.batch_size, step, args.seed) for step in range(args.steps)]
    taught = 0 if args.teacher else args.teacher_steps
    datums = [conversation_to_datum(messages, opened.model.renderer, 512) for messages in rows]
    lessons = [batch_of(datums, 8, step, args.seed) for step in range(taught)]

    asked = sum(prompt.length for batch in batches for prompt in batch)
    sampled = args.steps * args.batch_size * args.group_size * args.max_tokens  # at most
    scored = asked * args.group_size + sampled
    usd = opened.usd(sum(map(tokens, lessons)) + scored, asked, sampled)
    usd_of_teacher = graded_by.usd(prefill=scored)
    plan = opened.plan(
        teacher=args.teacher or f"{args.base_model} after {taught} steps of SFT",
        steps=args.steps,
        learning_rate=rate,
        answers_tokens_max=sampled,
        usd_max=None if usd is None or usd_of_teacher is None else usd + usd_of_teacher,
    )
    if args.dry_run:
        return plan

    service = opened.service()
    teacher_path = args.teacher or fine_tuned(service, args, lessons, rate)
    where = {"base_model": teacher_path} if is_base else {"model_path": teacher_path}
    teacher = service.create_sampling_client(**where).result()
    opening = service.create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed)
    student = opening.result()
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
        scoring = [teacher.compute_logprobs(scripting.with_answer(p, s.tokens)) for p, s in answers]
        data, kl = [], 0.0
        for (prompt, sequence), request in zip(answers, scoring, strict=True):
            theirs = request.result()[prompt.length :]  # (N,), the teacher's, of the answer
            ours = list(sequence.logprobs or ())  # (N,), those it was sampled with
            advantages = [float(q or 0.0) - p for q, p in zip(theirs, ours, strict=True)]
            kl -= sum(advantages)
            data.append(scripting.answer_datum(prompt, sequence, advantages))
        requests = (  # step and new sampler are submitted together, then awaited
            student.forward_backward(data, "importance_sampling"),
            student.optim_step(adam),
            student.save_weights_and_get_sampling_client(),
        )
        _, _, sampler = (request.result() for request in requests)
        metrics.append({"reverse_kl": kl / sum(len(s.tokens) for _, s in answers)})
        tell(f"step {step + 1}/{args.steps} ", metrics[-1])
    found = {"metrics": metrics, "teacher_path": teacher_path}
    return plan | found | scripting.saved(student, args.name)


def fine_tuned(service: Any, args: argparse.Namespace, lessons: list[Any], rate: float) -> str:
    """A teacher, after a step of SFT on each batch: its path."""
    client = service.create_lora_training_client(args.base_model, seed=args.seed + 1).result()
    adam = tinker.AdamParams(learning_rate=rate)

    def submit(step: int) -> tuple[Any, Any]:
        return client.forward_backward(lessons[step], "cross_entropy"), client.optim_step(adam)

    for step, output in enumerate(scripting.overlapped(submit, len(lessons)), start=1):
        tell(f"teacher: step {step}/{len(lessons)}  nll {output.metrics['loss:sum'] / 8:.4f}")
    return scripting.saved(client, "teacher")["sampler_path"]


if __name__ == "__main__":
    scripting.main(run, parsed())
