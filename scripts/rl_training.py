"""Reinforcement learning with verifiable rewards: groups of answers, each against its group's mean.

The task is addition, its reward 1 for the right number and up to 0.1 for digits alone. For a task
of your own change `problems` and `reward`. A reward that is equal for all of a group teaches
nothing.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
from typing import Any

import numpy as np
import tinker
from _backend import answer_datum, checked, main, open_model, parser, tell

SHOT = [{"role": "user", "content": "2 + 1 ="}, {"role": "assistant", "content": "3"}]


def parsed() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=15)
    options.add_argument("--groups", type=int, default=4, help="problems a step")
    options.add_argument("--group-size", type=int, default=8, help="answers to each problem")
    options.add_argument("--largest", type=int, default=9, help="number in a problem")
    options.add_argument("--max-tokens", type=int, default=8)
    options.add_argument("--learning-rate", type=float, default=1e-4)
    options.add_argument("--loss", choices=("importance_sampling", "ppo"), default="ppo")
    options.add_argument("--held-out", type=int, default=32, help="problems, for accuracy")
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--name", default="rl", help="of the checkpoint")
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


def problems(count: int, largest: int, draw: random.Random) -> list[tuple[str, int]]:
    pairs = [(draw.randint(1, largest), draw.randint(1, largest)) for _ in range(count)]
    return [(f"{a} + {b} =", a + b) for a, b in pairs]


def reward(text: str, answer: int) -> float:
    digits = sum(character.isdigit() for character in text) / max(len(text), 1)
    return float(re.findall(r"\d+", text)[-1:] == [str(answer)]) + 0.1 * digits


def drift(data: list[tinker.Datum], output: tinker.ForwardBackwardOutput) -> float:
    """Mean log-probability of the sampler less that of the trainer: below 0.01 when all is well."""
    pairs = zip(data, output.loss_fn_outputs, strict=True)
    differences = [
        (d.loss_fn_inputs["logprobs"].to_numpy() - found["logprobs"].to_numpy())[
            d.loss_fn_inputs["advantages"].to_numpy() != 0
        ]
        for d, found in pairs
    ]
    return float(np.concatenate(differences).mean())


def run(args: argparse.Namespace) -> dict[str, Any]:
    checked(args, "steps", "groups", "group_size", "max_tokens", rate=args.learning_rate)
    opened = open_model(args.base_model)
    model, draw = opened.model, random.Random(args.seed)

    def prompt_of(question: str) -> tinker.ModelInput:
        return model.prompt([*SHOT, {"role": "user", "content": question}])

    held_out = problems(args.held_out, args.largest, draw)
    answers = args.steps * args.groups * args.group_size
    length = prompt_of(f"{args.largest} + {args.largest} =").length
    prefill = (args.steps * args.groups + 2 * args.held_out) * length
    sampled = (answers + 2 * args.held_out) * args.max_tokens  # at most
    trained = answers * (length + args.max_tokens)
    plan = opened.facts() | {
        **{"steps": args.steps, "answers": answers, "tokens_max": prefill + sampled + trained},
        **{"usd_max": opened.usd(trained, prefill, sampled)},
    }
    tell("plan:", plan)
    if args.dry_run:
        return plan

    client = (
        opened.service()
        .create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed)
        .result()
    )
    params = tinker.SamplingParams(max_tokens=args.max_tokens, stop=model.stop())  # temperature 1
    greedy = tinker.SamplingParams(max_tokens=args.max_tokens, stop=model.stop(), temperature=0.0)
    adam = tinker.AdamParams(learning_rate=args.learning_rate)

    def sampled_from(sampler: tinker.SamplingClient, asked: Any, count: int, how: Any) -> Any:
        requests = [sampler.sample(prompt_of(question), count, how) for question, _ in asked]
        return [request.result().sequences for request in requests]  # all submitted, then awaited

    def accuracy(sampler: tinker.SamplingClient) -> float:
        found = sampled_from(sampler, held_out, 1, greedy)
        pairs = zip(found, held_out, strict=True)
        is_right = [reward(model.answer(s.tokens)[0], a) >= 1 for [s], (_, a) in pairs]
        return statistics.fmean(is_right)

    sampler = client.save_weights_and_get_sampling_client().result()
    before = accuracy(sampler)
    metrics = []
    for step in range(args.steps):
        batch = problems(args.groups, args.largest, draw)
        data, all_rewards, constant = [], [], 0
        answered = sampled_from(sampler, batch, args.group_size, params)
        for (question, answer), sequences_G in zip(batch, answered, strict=True):
            rewards_G = np.array([reward(model.answer(s.tokens)[0], answer) for s in sequences_G])
            advantages_G = rewards_G - rewards_G.mean()
            all_rewards.append(rewards_G.mean())
            if np.ptp(rewards_G) == 0:
                constant += 1  # no gradient in this group
                continue
            prompt = prompt_of(question)
            data += [
                answer_datum(prompt, s, [advantage] * len(s.tokens))  # one a token
                for s, advantage in zip(sequences_G, advantages_G, strict=True)
            ]
        numbers = {"reward": float(np.mean(all_rewards)), "constant_groups": constant}
        if data:
            # Step and new sampler are submitted together, then awaited.
            step_requests = client.forward_backward(data, args.loss), client.optim_step(adam)
            renewed = client.save_weights_and_get_sampling_client()
            output, _ = (request.result() for request in step_requests)
            numbers |= {"drift": drift(data, output), "loss": output.metrics["loss:sum"]}
            sampler = renewed.result()
        metrics.append(numbers)
        tell(f"step {step + 1}/{args.steps} ", numbers)
    after = accuracy(sampler)
    saved = client.save_weights_for_sampler(args.name, ttl_seconds=604_800)
    state = client.save_state(args.name, ttl_seconds=604_800)
    paths = {"sampler_path": saved.result().path, "state_path": state.result().path}
    return plan | {"metrics": metrics, "accuracy_before": before, "accuracy_after": after} | paths


if __name__ == "__main__":
    main(run, parsed())
