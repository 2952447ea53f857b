"""Compare checkpoints and their base model on held-out conversations: loss, and graded answers.

Each is asked for the last reply of a conversation, greedily, and graded against what is written
there. Of --data it takes the share that supervised_training.py keeps aside under the same --seed;
of a file that was never trained on, take all: --eval-share 1.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker
from tinker_cookbook.renderers import TrainOnWhat

from tinker_mcp import scripting
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.datasets import split


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def overlap(answer: str, reference: str) -> float:
    """F1 of the words of both, 0 to 1."""
    ours, theirs = Counter(words(answer)), Counter(words(reference))
    return 2 * (ours & theirs).total() / max(ours.total() + theirs.total(), 1)


GRADERS: dict[str, Callable[[str, str], float]] = {
    "overlap": overlap,
    "exact": lambda answer, reference: float(words(answer) == words(reference)),
    "contains": lambda answer, reference: float(reference.strip() in answer),
}


def parsed() -> argparse.Namespace:
    options = scripting.parser(__doc__)
    options.add_argument("--data", type=Path, help="default: 128 conversations of the cookbook")
    options.add_argument("--eval-share", type=float, default=0.125, help="of the rows, see above")
    options.add_argument("--limit", type=int, default=16, help="rows at most")
    options.add_argument("--seed", type=int, default=0, help="of the split")
    options.add_argument("--checkpoint", action="append", default=[], help="sampler path; again")
    options.add_argument("--grader", choices=GRADERS, default="overlap")
    options.add_argument("--max-tokens", type=int, default=48)
    options.add_argument("--show", type=int, default=3, help="rows whose answers are told")
    return options.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    scripting.checked(args, "limit", "max_tokens")
    found = scripting.examples(args.data or scripting.example_data())
    held_out = found if args.eval_share == 1 else split(found, args.eval_share, args.seed)[1]
    if not held_out:
        raise InvalidInputError("--eval-share 0 leaves no row.", next_step="Try 0.125.")
    rows = [conversation.messages for conversation in held_out[: args.limit]]
    opened = scripting.open_model(args.base_model)
    model = opened.model
    prompts = [model.prompt(messages[:-1]) for messages in rows]
    last = TrainOnWhat.LAST_ASSISTANT_MESSAGE  # tokens (N) of all, and N weights: 1 in that reply
    scored = [model.renderer.build_supervised_example(messages, last) for messages in rows]
    sides = 1 + len(args.checkpoint)
    lengths = [prompt.length for prompt in prompts] + [whole.length for whole, _ in scored]
    prefill, sampled = sides * sum(lengths), sides * len(rows) * args.max_tokens
    plan = opened.plan(
        rows=len(rows),
        grader=args.grader,
        checkpoints=len(args.checkpoint),
        tokens_max=prefill + sampled,
        usd_max=opened.usd(prefill=prefill, sample=sampled),
    )
    if args.dry_run:
        return plan

    service = opened.service()
    params = tinker.SamplingParams(max_tokens=args.max_tokens, temperature=0.0, stop=model.stop())
    opening = {"base": service.create_sampling_client(base_model=args.base_model)}
    opening |= {path: service.create_sampling_client(model_path=path) for path in args.checkpoint}
    samplers = {name: future.result() for name, future in opening.items()}
    # Of all sides at once: each row's answer and each token's log-probability in the reference.
    requests = {
        name: [
            (sampler.sample(prompt, 1, params), sampler.compute_logprobs(whole))
            for prompt, (whole, _) in zip(prompts, scored, strict=True)
        ]
        for name, sampler in samplers.items()
    }
    results = {}
    shown = [
        {
            "prompt": [turn["content"] for turn in messages[:-1]],
            "reference": messages[-1]["content"],
        }
        for messages in rows[: max(args.show, 0)]
    ]
    for name, of_rows in requests.items():
        answers: list[str] = []
        grades, nll, trained, cut = [], 0.0, 0.0, 0
        for messages, (_, weights), (sampling, scoring) in zip(rows, scored, of_rows, strict=True):
            [sequence] = sampling.result().sequences
            text, is_complete = model.answer(sequence.tokens)
            answers.append(text)
            grades.append(GRADERS[args.grader](text, str(messages[-1]["content"])))
            cut += not is_complete
            pairs = list(zip(weights.tolist(), scoring.result(), strict=True))[1:]  # no score at 0
            nll -= sum(weight * (logprob or 0.0) for weight, logprob in pairs)
            trained += sum(weight for weight, _ in pairs)
        grade = sum(grades) / len(grades)
        results[name] = {"grade": grade, "nll": nll / trained, "cut_answers": cut}
        scripting.tell(name, results[name])
        for row, answer in zip(shown, answers, strict=False):
            row[name] = answer
    return plan | {"results": results, "answers": shown}


if __name__ == "__main__":
    scripting.main(run, parsed())
