"""RLHF in its three stages: SFT, a reward model by Bradley-Terry, and RL against it.

The reward of an answer is the reward model's log-probability of "Yes" after the question whether
it was good; training makes that higher for the chosen one of each pair. Watch the answers, not
only the reward: a policy learns what the reward model got wrong. Data: pairs, as for
dpo_training.py.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import chain
from pathlib import Path
from typing import Any

import tinker
import torch
from tinker_cookbook.supervised.common import datum_from_model_input_weights
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp import scripting
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.scripting import tell
from tinker_mcp.training.datasets import split
from tinker_mcp.training.formats import Pair
from tinker_mcp.training.loop import batch_of

JUDGE = {"role": "user", "content": "Was that a good answer? Reply Yes or No."}


def parsed() -> argparse.Namespace:
    options = scripting.training_parser(__doc__, steps=4, learning_rate=None, name="rlhf")
    options.add_argument("--data", type=Path, help="pairs; default: replies without a preamble")
    options.add_argument("--sft-steps", type=int, default=6)
    options.add_argument("--reward-steps", type=int, default=8)
    options.add_argument("--rl-learning-rate", type=float, default=4e-5)
    options.add_argument("--batch-size", type=int, default=4, help="pairs, or prompts, a step")
    options.add_argument("--group-size", type=int, default=4, help="answers to each prompt")
    options.add_argument("--max-tokens", type=int, default=32)
    return options.parse_args()


def bradley_terry(_: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """-log sigmoid(reward of chosen - of rejected); each reward is a datum's last logprob."""
    rewards = torch.stack([found[-1] for found in logprobs])  # (2B,): chosen, rejected, chosen ...
    margins = rewards[::2] - rewards[1::2]  # (B,)
    # The other positions must take part in the graph, with gradient 0.
    loss = -torch.nn.functional.logsigmoid(margins).mean() + 0 * sum(f.sum() for f in logprobs)
    return loss, {"bt_loss": loss.item(), "accuracy": (margins > 0).float().mean().item()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    rate, size = scripting.learning_rate(args), args.batch_size
    counts = ("steps", "sft_steps", "reward_steps", "batch_size", "group_size", "max_tokens")
    scripting.checked(args, *counts, rate=rate)
    scripting.checked(args, "rank", rate=args.rl_learning_rate)
    pairs = scripting.preferences(args.data)
    opened = scripting.open_model(args.base_model)
    model = opened.model
    yes = model.encode("Yes")[:1]

    def verdict(messages: Any) -> tinker.ModelInput:
        """A conversation and the judge's question, answered with Yes."""
        return scripting.with_answer(model.prompt([*messages, JUDGE]), yes)

    def judged(pair: Pair) -> list[tinker.Datum]:
        """The verdicts on both sides of a pair; only Yes carries weight."""
        sides = [verdict(pair.chosen), verdict(pair.rejected)]
        weights = [torch.arange(1, side.length + 1) // side.length for side in sides]
        return list(map(datum_from_model_input_weights, sides, weights))

    train, held_out = split(pairs, 1 / 16, args.seed)
    lessons = [conversation_to_datum(pair.chosen, model.renderer, 512) for pair in train]
    comparisons, tests = list(map(judged, train)), list(chain(*map(judged, held_out)))

    # At most: as if each text were as long as the longest. A custom loss is two passes.
    answers = args.steps * size * args.group_size
    longest = max(d.model_input.length for d in chain(*comparisons)) + args.max_tokens
    trained = (size * (args.sft_steps + 4 * args.reward_steps) + len(tests) + answers) * longest
    usd = opened.usd(trained, 2 * answers * longest, answers * args.max_tokens)
    plan = opened.plan(pairs=len(train), held_out=len(held_out), learning_rate=rate, usd_max=usd)
    if args.dry_run:
        return plan

    service = opened.service()
    opening = [
        service.create_lora_training_client(args.base_model, rank=args.rank, seed=seed)
        for seed in (args.seed, args.seed + 1)
    ]
    policy, judge = (future.result() for future in opening)
    adam = tinker.AdamParams(learning_rate=rate)
    gentle = tinker.AdamParams(learning_rate=args.rl_learning_rate)

    def imitate(step: int) -> tuple[Any, Any]:
        batch = batch_of(lessons, size, step, args.seed)
        return policy.forward_backward(batch, "cross_entropy"), policy.optim_step(adam)

    def compare(step: int) -> tuple[Any, Any]:
        batch = list(chain(*batch_of(comparisons, size, step, args.seed)))
        return judge.forward_backward_custom(batch, bradley_terry), judge.optim_step(adam)

    sft, judging, rewards = [], [], []
    for output in scripting.overlapped(imitate, args.sft_steps):
        sft.append(output.metrics["loss:sum"] / size)  # each conversation's weights sum to 1
        tell(f"1. SFT on the chosen answers: step {len(sft)}/{args.sft_steps}  nll {sft[-1]:.4f}")
    for output in scripting.overlapped(compare, args.reward_steps):
        judging.append(output.metrics["bt_loss"])
        tell(f"2. reward model: step {len(judging)}/{args.reward_steps}  loss {judging[-1]:.4f}")
    found = judge.forward(tests, "cross_entropy").result().loss_fn_outputs
    _, scores = bradley_terry(tests, [output["logprobs"].to_torch() for output in found])
    tell("2. reward model, held out:", scores)

    rewarding = judge.save_weights_and_get_sampling_client().result()
    params = tinker.SamplingParams(max_tokens=args.max_tokens, stop=model.stop())

    def graded(messages: Any, sequence: tinker.SampledSequence) -> Any:
        answer = {"role": "assistant", "content": model.answer(sequence.tokens)[0]}
        return rewarding.compute_logprobs(verdict([*messages, answer]), 1)  # of Yes alone

    sampler = policy.save_weights_and_get_sampling_client().result()
    for step in range(args.steps):
        asked = [pair.chosen[:-1] for pair in batch_of(train, size, step, args.seed)]
        prompts = list(map(model.prompt, asked))
        asking = [sampler.sample(prompt, args.group_size, params) for prompt in prompts]
        groups = [request.result().sequences for request in asking]
        grading = [[graded(m, s) for s in group] for m, group in zip(asked, groups, strict=True)]
        rewards_PG = [[float(one.result()[-1]) for one in of_group] for of_group in grading]
        data = list(chain(*map(scripting.group_datums, prompts, groups, rewards_PG)))
        if not data:
            raise InvalidInputError("All rewards are equal.", next_step="Try fewer --steps.")
        requests = (  # step and new sampler are submitted together, then awaited
            policy.forward_backward(data, "importance_sampling"),
            policy.optim_step(gentle),
            policy.save_weights_and_get_sampling_client(),
        )
        _, _, sampler = (request.result() for request in requests)
        rewards.append(statistics.fmean(chain(*rewards_PG)))
        example = model.answer(groups[0][0].tokens)[0]
        tell(f"3. RL: step {step + 1}/{args.steps}  reward {rewards[-1]:.4f}  {example!r}")
    stages = {"sft_losses": sft, "reward_model_losses": judging, "rewards": rewards}
    return plan | stages | {"reward_model_held_out": scores} | scripting.saved(policy, args.name)


if __name__ == "__main__":
    scripting.main(run, parsed())
