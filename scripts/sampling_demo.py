"""Sample answers from a base model or a checkpoint, and score a given answer.

Prompts go through the model's renderer: a chat model that is given bare text answers something
else.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import tinker

from tinker_mcp import scripting

PROMPTS = ["What is the capital of France?", "Name three fruits.", "Write one line about the sea."]


def parsed() -> argparse.Namespace:
    options = scripting.parser(__doc__)
    options.add_argument("--prompt", action="append", help="again for more; default: three")
    options.add_argument("--system", help="a system message before each prompt")
    options.add_argument("--checkpoint", help="tinker://.../sampler_weights/..., of --base-model")
    options.add_argument("--num-samples", type=int, default=2, help="answers to each prompt")
    options.add_argument("--max-tokens", type=int, default=48)
    options.add_argument("--temperature", type=float, default=0.7)
    options.add_argument("--top-p", type=float, default=1.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--score", default="Paris.", help="an answer to the first prompt to score")
    return options.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    scripting.checked(args, "num_samples", "max_tokens")
    opened = scripting.open_model(args.base_model)
    system = [{"role": "system", "content": args.system}] if args.system else []
    questions = args.prompt or PROMPTS
    prompts = [opened.model.prompt([*system, {"role": "user", "content": q}]) for q in questions]
    sampled = len(prompts) * args.num_samples * args.max_tokens  # at most
    prefill = sum(prompt.length for prompt in prompts)
    scored = prompts[0].length + len(opened.model.encode(args.score))
    plan = opened.plan(
        checkpoint=args.checkpoint,
        prompts=len(prompts),
        sampled_tokens_max=sampled,
        usd_max=opened.usd(prefill=prefill + scored, sample=sampled),
    )
    if args.dry_run:
        return plan

    # A sampling client keeps the weights it was made from: after training, make a new one.
    base = None if args.checkpoint else args.base_model
    opening = opened.service().create_sampling_client(model_path=args.checkpoint, base_model=base)
    sampler = opening.result()
    params = tinker.SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=opened.model.stop(),
    )
    began = time.monotonic()
    # All are submitted before the first is awaited: they are sampled together.
    requests = [sampler.sample(prompt, args.num_samples, params) for prompt in prompts]
    answered = [request.result().sequences for request in requests]
    seconds = time.monotonic() - began
    tokens = sum(len(sequence.tokens) for sequences in answered for sequence in sequences)

    results = []
    for question, sequences in zip(questions, answered, strict=True):
        answers = []
        for sequence in sequences:
            text, is_complete = opened.model.answer(sequence.tokens)
            logprob = sum(sequence.logprobs or ()) / max(len(sequence.tokens), 1)
            answers.append({"text": text, "is_complete": is_complete, "mean_logprob": logprob})
            scripting.tell(f"{question} -> {text!r}")
        results.append({"prompt": question, "answers": answers})
    return plan | {
        "results": results,
        "sampled_tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "score": score(opened.model.encode(args.score), prompts[0], sampler),
    }


def score(answer: list[int], prompt: tinker.ModelInput, sampler: tinker.SamplingClient) -> float:
    """Mean log-probability of the answer's tokens after the prompt, in nats."""
    whole = scripting.with_answer(prompt, answer)
    logprobs = sampler.compute_logprobs(whole, prompt_logprobs_last_n=len(answer)).result()
    return sum(value or 0.0 for value in logprobs[-len(answer) :]) / len(answer)


if __name__ == "__main__":
    scripting.main(run, parsed())
