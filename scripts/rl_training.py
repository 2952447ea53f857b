"""Reinforcement learning with verifiable rewards: groups of answers, each against its group's mean.

The task is addition, its reward 1 for the right number and up to 0.1 for digits alone; accuracy is
measured on sums that are never trained on, in neither order. For a task of your own change
`problems` and `reward`. A reward that is equal for all of a group teaches nothing.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from typing import Any

import tinker

from tinker_mcp import scripting
from tinker_mcp.training import models
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of

Problem = tuple[int, int]
SHOT = [{"role": "user", "content": "2 + 1 ="}, {"role": "assistant", "content": "3"}]


def parsed() -> argparse.Namespace:
    options = scripting.training_parser(__doc__, steps=15, learning_rate=1e-4, name="rl")
    options.add_argument("--groups", type=int, default=4, help="problems a step")
    options.add_argument("--group-size", type=int, default=8, help="answers to each problem")
    options.add_argument("--largest", type=int, default=9, help="number in a problem")
    options.add_argument("--eval-share", type=float, default=0.25, help="of the problems")
    options.add_argument("--max-tokens", type=int, default=8)
    options.add_argument("--loss", choices=("importance_sampling", "ppo"), default="ppo")
    return options.parse_args()


def problems(largest: int, eval_share: float, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Those to train on and those to measure with; a + b and b + a are on one side."""
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1)]
    train, test = split(pairs, eval_share, seed)
    return train + [(b, a) for a, b in train if a < b], test + [(b, a) for a, b in test if a < b]


def reward(text: str, problem: Problem) -> float:
    is_right = re.findall(r"\d+", text)[-1:] == [str(sum(problem))]
    return is_right + 0.1 * sum(map(str.isdigit, text)) / max(len(text), 1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    counts = ("steps", "groups", "group_size", "max_tokens", "rank")
    rate = scripting.learning_rate(args, models.rl_learning_rate())
    scripting.checked(args, *counts, rate=rate)
    train, test = problems(args.largest, args.eval_share, args.seed)
    batches = [batch_of(train, args.groups, step, args.seed) for step in range(args.steps)]
    opened = scripting.open_model(args.base_model)
    model = opened.model

    def prompt_of(problem: Problem) -> tinker.ModelInput:
        a, b = problem
        return model.prompt([*SHOT, {"role": "user", "content": f"{a} + {b} ="}])

    answers = args.steps * args.groups * args.group_size
    length = max(prompt_of(problem).length for problem in train)
    prefill = (args.steps * args.groups + 2 * len(test)) * length
    sampled = (answers + 2 * len(test)) * args.max_tokens  # at most
    trained = answers * (length + args.max_tokens)
    plan = opened.plan(
        steps=args.steps,
        answers=answers,
        learning_rate=rate,
        tokens_max=prefill + sampled + trained,
        usd_max=opened.usd(trained, prefill, sampled),
    )
    if args.dry_run:
        return plan

    service = opened.service()
    opening = service.create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed)
    client = opening.result()
    adam = tinker.AdamParams(learning_rate=rate)

    def answered(asked: list[Problem], count: int, temperature: float) -> tuple[Any, Any]:
        """Answers to each problem, and their rewards; all are asked for before the first wait."""
        params = tinker.SamplingParams(
            max_tokens=args.max_tokens, stop=model.stop(), temperature=temperature
        )
        requests = [sampler.sample(prompt_of(problem), count, params) for problem in asked]
        sequences_PG = [request.result().sequences for request in requests]
        return sequences_PG, [
            [reward(model.answer(sequence.tokens)[0], problem) for sequence in sequences_G]
            for problem, sequences_G in zip(asked, sequences_PG, strict=True)
        ]

    def accuracy() -> float:
        return statistics.fmean(first >= 1 for [first] in answered(test, 1, 0.0)[1])

    sampler = client.save_weights_and_get_sampling_client().result()
    before = accuracy()
    scripting.tell(f"accuracy before: {before:.3f} of {len(test)} problems")
    metrics = []
    for step, batch in enumerate(batches):
        sequences_PG, rewards_PG = answered(batch, args.group_size, 1.0)
        prompts = map(prompt_of, batch)  # of a group whose rewards are equal comes no datum
        groups = list(map(scripting.group_datums, prompts, sequences_PG, rewards_PG))
        data = list(itertools.chain(*groups))
        numbers = {"reward": statistics.fmean(map(statistics.fmean, rewards_PG))}
        numbers["constant_groups"] = groups.count([])
        if data:
            requests = (  # step and new sampler are submitted together, then awaited
                client.forward_backward(data, args.loss),
                client.optim_step(adam),
                client.save_weights_and_get_sampling_client(),
            )
            output, _, sampler = (request.result() for request in requests)
            numbers |= {"drift": scripting.drift(data, output), "loss": output.metrics["loss:sum"]}
        metrics.append(numbers)
        scripting.tell(f"step {step + 1}/{args.steps} ", numbers)
    scores = {"accuracy_before": before, "accuracy_after": accuracy(), "metrics": metrics}
    return plan | scores | scripting.saved(client, args.name)


if __name__ == "__main__":
    scripting.main(run, parsed())
