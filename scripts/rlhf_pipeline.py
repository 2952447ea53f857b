"""RLHF in its three stages: SFT, a reward model by Bradley-Terry, and RL against it.

The reward of an answer is the reward model's log-probability of "Yes" after the question whether
it was good; training makes that higher for the chosen one of each pair. Watch the answers, not
only the reward: a policy learns what the reward model got wrong. Data: pairs, as for
dpo_training.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from _backend import answer_datum, checked, main, open_model, parser, preferences, tell, tokens
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp.training import models
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of

JUDGE = {"role": "user", "content": "Was that a good answer? Reply Yes or No."}


def parsed() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="pairs; default: replies without a preamble")
    options.add_argument("--sft-steps", type=int, default=6)
    options.add_argument("--reward-steps", type=int, default=8)
    options.add_argument("--rl-steps", type=int, default=4)
    options.add_argument("--batch-size", type=int, default=4, help="pairs, or prompts, a step")
    options.add_argument("--group-size", type=int, default=4, help="answers to each prompt")
    options.add_argument("--max-tokens", type=int, default=32)
    options.add_argument("--learning-rate", type=float, help="of SFT; default: the cookbook's")
    options.add_argument("--rl-learning-rate", type=float, default=4e-5)
    options.add_argument("--name", default="rlhf", help="of the checkpoint")
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


def pipelined(submit: Any, steps: int, said: Any) -> list[float]:
    """Submit each step before the one before it is awaited; what `said` makes of the outputs."""
    found: list[float] = []
    requests = submit(0)
    for step in range(steps):
        upcoming = submit(step + 1) if step + 1 < steps else None
        output, _ = (request.result() for request in requests)
        found.append(said(output))
        tell(f"step {step + 1}/{steps}  {found[-1]:.4f}")
        requests = upcoming or requests
    return found


def bradley_terry(_: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """-log sigmoid(reward of chosen - of rejected); each reward is a datum's last logprob."""
    rewards = torch.stack([found[-1] for found in logprobs])  # (2B,): chosen, rejected, chosen ...
    margins = rewards[::2] - rewards[1::2]  # (B,)
    # The other positions must take part in the graph, with gradient 0.
    loss = -torch.nn.functional.logsigmoid(margins).mean() + 0 * sum(f.sum() for f in logprobs)
    return loss, {"bt_loss": loss.item(), "accuracy": (margins > 0).float().mean().item()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate = args.learning_rate or float(models.learning_rate(args.base_model).value)
    counts = ("sft_steps", "reward_steps", "rl_steps", "batch_size", "group_size", "max_tokens")
    checked(args, *counts, rate=rate)
    checked(args, rate=args.rl_learning_rate)
    pairs = preferences(args.data)
    opened = open_model(args.base_model)
    model = opened.model
    yes = model.tokenizer.encode("Yes", add_special_tokens=False)[:1]

    def verdict(messages: Any) -> tinker.ModelInput:
        """A conversation and the judge's question, answered with Yes."""
        question = model.prompt([*messages, JUDGE])
        return question.append(tinker.EncodedTextChunk(tokens=yes))

    def verdict_datum(messages: Any) -> tinker.Datum:
        ids = verdict(messages).to_ints()
        weights = [0.0] * (len(ids) - 2) + [1.0]
        return tinker.Datum(
            model_input=tinker.ModelInput.from_ints(ids[:-1]),
            loss_fn_inputs={"target_tokens": ids[1:], "weights": weights},
        )

    train, held_out = split(pairs, 1 / 16, args.seed)
    lessons = [conversation_to_datum(pair.chosen, model.renderer, 512) for pair in train]
    judged = [(verdict_datum(p.chosen), verdict_datum(p.rejected)) for p in train]
    tests = [
        side for p in held_out for side in (verdict_datum(p.chosen), verdict_datum(p.rejected))
    ]
    prompts = [(pair.chosen[:-1], model.prompt(pair.chosen[:-1])) for pair in train]

    def batch(units: list[Any], step: int) -> list[Any]:
        return batch_of(units, args.batch_size, step, args.seed)

    answers = args.rl_steps * args.batch_size * args.group_size
    asked = max(prompt.length for _, prompt in prompts) * answers  # at most, as all below
    trained = sum(tokens(batch(lessons, step)) for step in range(args.sft_steps)) + tokens(tests)
    trained += sum(2 * tokens(p) for s in range(args.reward_steps) for p in batch(judged, s))
    trained += asked + answers * args.max_tokens
    prefill, sampled = 2 * asked + answers * (args.max_tokens + 24), answers * args.max_tokens
    plan = opened.facts() | {
        **{"train": len(train), "held_out": len(held_out), "learning_rate": rate},
        **{"tokens_max": trained + prefill + sampled},
        **{"usd_max": opened.usd(trained, prefill, sampled)},
    }
    tell("plan:", plan)
    if args.dry_run:
        return plan

    service = opened.service()
    adam = tinker.AdamParams(learning_rate=rate)

    tell("1. SFT on the chosen answers")
    policy = service.create_lora_training_client(args.base_model, seed=args.seed).result()

    def imitate(step: int) -> tuple[Any, Any]:
        loss = policy.forward_backward(batch(lessons, step), "cross_entropy")
        return loss, policy.optim_step(adam)

    size = args.batch_size  # each conversation's weights sum to 1
    sft = pipelined(imitate, args.sft_steps, lambda output: output.metrics["loss:sum"] / size)

    tell("2. reward model")
    judge = service.create_lora_training_client(args.base_model, seed=args.seed + 1).result()

    def compare(step: int) -> tuple[Any, Any]:
        data = [side for pair in batch(judged, step) for side in pair]
        return judge.forward_backward_custom(data, bradley_terry), judge.optim_step(adam)

    losses = pipelined(compare, args.reward_steps, lambda output: output.metrics["bt_loss"])
    found = judge.forward(tests, "cross_entropy").result().loss_fn_outputs
    _, scores = bradley_terry(tests, [output["logprobs"].to_torch() for output in found])
    tell("held out:", scores)
    rewarding = judge.save_weights_and_get_sampling_client().result()

    tell("3. RL against it")
    params = tinker.SamplingParams(max_tokens=args.max_tokens, stop=model.stop())
    gentle = tinker.AdamParams(learning_rate=args.rl_learning_rate)
    sampler = policy.save_weights_and_get_sampling_client().result()
    rewards = []
    for step in range(args.rl_steps):
        asking = [
            (m, p, sampler.sample(p, args.group_size, params)) for m, p in batch(prompts, step)
        ]
        groups = [(m, p, request.result().sequences) for m, p, request in asking]
        grading = [
            [rewarding.compute_logprobs(verdict([*m, reply(model, s)]), 1) for s in sequences_G]
            for m, _, sequences_G in groups
        ]
        data, means = [], []
        for (_, prompt, sequences_G), requests in zip(groups, grading, strict=True):
            rewards_G = np.array([request.result()[-1] for request in requests], dtype=float)
            means.append(rewards_G.mean())
            for sequence, advantage in zip(sequences_G, rewards_G - rewards_G.mean(), strict=True):
                data.append(answer_datum(prompt, sequence, [advantage] * len(sequence.tokens)))
        # Step and new sampler are submitted together, then awaited.
        sent = policy.forward_backward(data, "importance_sampling"), policy.optim_step(gentle)
        renewed = policy.save_weights_and_get_sampling_client()
        for request in sent:
            request.result()
        sampler = renewed.result()
        rewards.append(float(np.mean(means)))
        tell(f"step {step + 1}/{args.rl_steps}  reward {rewards[-1]:.4f}")
        tell("   for example:", repr(model.answer(groups[0][2][0].tokens)[0]))
    saved = policy.save_weights_for_sampler(args.name, ttl_seconds=604_800).result()
    stages = {"sft_losses": sft, "reward_model_losses": losses, "rewards": rewards}
    return plan | stages | {"reward_model_held_out": scores, "sampler_path": saved.path}


def reply(model: Any, sequence: tinker.SampledSequence) -> dict[str, str]:
    return {"role": "assistant", "content": model.answer(sequence.tokens)[0]}


if __name__ == "__main__":
    main(run, parsed())
