"""Compare checkpoints and their base model on held-out conversations: loss, and graded answers.

Each is asked for the last reply of a conversation, greedily, and graded against what is written
there. Of --data it takes the share that supervised_training.py keeps aside under the same --seed;
of a file that was never trained on, take all: --eval-share 1.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker
from _backend import CONVERSATIONS, checked, examples, main, open_model, parser, tell
from tinker_cookbook.renderers import TrainOnWhat

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.datasets import split

BASE = "base"


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def overlap(answer: str, reference: str) -> float:
    """F1 of the words of both, 0 to 1."""
    ours, theirs = words(answer), words(reference)
    shared = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
    return 2 * shared / max(len(ours) + len(theirs), 1)


GRADERS: dict[str, Callable[[str, str], float]] = {
    "overlap": overlap,
    "exact": lambda answer, reference: float(words(answer) == words(reference)),
    "contains": lambda answer, reference: float(reference.strip() in answer),
}


def parsed() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=CONVERSATIONS, help="128 conversations")
    options.add_argument("--eval-share", type=float, default=0.125, help="of the rows, see above")
    options.add_argument("--limit", type=int, default=16, help="rows at most")
    options.add_argument("--seed", type=int, default=0, help="of the split")
    options.add_argument("--checkpoint", action="append", default=[], help="sampler path; again")
    options.add_argument("--grader", choices=GRADERS, default="overlap")
    options.add_argument("--max-tokens", type=int, default=48)
    return options.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    checked(args, "limit", "max_tokens")
    found = examples(args.data)
    held_out = found if args.eval_share == 1 else split(found, args.eval_share, args.seed)[1]
    if not held_out:
        raise InvalidInputError("--eval-share 0 leaves no row.", next_step="Try 0.125.")
    rows = [conversation.messages for conversation in held_out[: args.limit]]
    opened = open_model(args.base_model)
    prompts = [opened.model.prompt(messages[:-1]) for messages in rows]
    scored = [reply_of(messages, opened.model.renderer) for messages in rows]
    sides = 1 + len(args.checkpoint)
    prefill = sides * sum(
        p.length + whole.length for p, (whole, _) in zip(prompts, scored, strict=True)
    )
    sampled = sides * len(rows) * args.max_tokens
    plan = opened.facts() | {
        **{"rows": len(rows), "grader": args.grader, "checkpoints": len(args.checkpoint)},
        **{"tokens_max": prefill + sampled, "usd_max": opened.usd(prefill=prefill, sample=sampled)},
    }
    tell("plan:", plan)
    if args.dry_run:
        return plan

    service = opened.service()
    params = tinker.SamplingParams(
        max_tokens=args.max_tokens, temperature=0.0, stop=opened.model.stop()
    )
    opening = {BASE: service.create_sampling_client(base_model=args.base_model)}
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
    for name, of_rows in requests.items():
        grades, nll, trained, cut = [], 0.0, 0.0, 0
        for messages, (_, weights), (sampling, scoring) in zip(rows, scored, of_rows, strict=True):
            [sequence] = sampling.result().sequences
            text, is_complete = opened.model.answer(sequence.tokens)
            grades.append(GRADERS[args.grader](text, str(messages[-1]["content"])))
            cut += not is_complete
            pairs = list(zip(weights, scoring.result(), strict=True))[1:]  # the first has no score
            nll -= sum(weight * (logprob or 0.0) for weight, logprob in pairs)
            trained += sum(weight for weight, _ in pairs)
        results[name] = {
            **{"grade": sum(grades) / len(grades), "nll": nll / trained},
            **{"cut_answers": cut},
        }
        tell(name, results[name])
    return plan | {"results": results}


def reply_of(messages: Any, renderer: Any) -> tuple[tinker.ModelInput, list[float]]:
    """Tokens (N) of a conversation, and which (N weights) are its last reply's."""
    tokens, weights = renderer.build_supervised_example(
        messages, TrainOnWhat.LAST_ASSISTANT_MESSAGE
    )
    return tokens, weights.tolist()


if __name__ == "__main__":
    main(run, parsed())
