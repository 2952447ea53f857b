"""What an rl run needs settled: its reward, tried on a few rows, or its environment; its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.runs.arguments import RunArguments
from tinker_mcp.runs.findings import Findings
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.rl_options import CACHED_SHARE, RlArguments, RlOptions
from tinker_mcp.settings import Settings
from tinker_mcp.training import losses, roots
from tinker_mcp.training.prices import Price
from tinker_mcp.training.rewards import opening, specs
from tinker_mcp.training.rewards.contract import Completion, Scored
from tinker_mcp.training.rewards.rows import answer_of

_TRIED_ROWS = 3
_LOW_SHARE = 0.25
"""Of max_tokens: what an answer is taken to have in the low estimate."""


def agree(arguments: RunArguments, findings: Findings) -> None:
    """What can be said of the arguments alone."""
    asked = arguments.rl
    if asked is None:
        findings.refuse(
            "method=rl needs rl, its options",
            'Give rl={"reward": ...} or rl={"environment": ...}; search_docs("rl") has all names.',
        )
        return
    if (asked.reward is None) == (asked.environment is None):
        findings.refuse(
            "rl needs either reward or environment",
            'Give rl={"reward": "<path of a Python file>"}, a built-in such as '
            '{"reward": {"type": "number"}}, or {"environment": "package.module:Name"}.',
        )
    if asked.environment is not None:
        _agree_on_environment(arguments, findings)
    elif arguments.data is None:
        findings.refuse("data is missing", "Give a file of prompts, or rl.environment.")
    try:
        losses.complete_config(asked.loss_fn, asked.loss_config)
    except TinkerMcpError as error:
        findings.refuse(
            error.problem.rstrip(".").replace("loss_fn_config", "rl.loss_config"),
            error.next_step.replace("loss_fn_config", "rl.loss_config"),
        )


def _agree_on_environment(arguments: RunArguments, findings: Findings) -> None:
    for name in ("data", "eval_data", "eval_share", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value != 0:
            findings.refuse(
                f"{name}={value!r} does not go with rl.environment, which brings its own prompts",
                f"Leave {name} out.",
            )
    if arguments.steps is None:
        findings.refuse("steps is missing", "Give steps: an environment has no end of its own.")


async def options(
    arguments: RunArguments,
    prompts: Sequence[Prompt],
    settings: Settings,
    price: Price | None,
    findings: Findings,
) -> RlOptions | None:
    """The options, settled; the reward was tried. None where they cannot be used."""
    asked = arguments.rl
    if asked is None:
        return None
    if asked.environment is not None:
        if not await _has_environment(asked, findings):
            return None
        return _settled(asked, None, None, price)
    try:
        reward = specs.spec_of(asked.reward or "")
        dumped, sha256 = await anyio.to_thread.run_sync(_kept, reward, settings)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return None
    if not await _try(reward, prompts, settings, findings):
        return None
    return _settled(asked, dumped, sha256, price)


async def _has_environment(asked: RlArguments, findings: Findings) -> bool:
    from tinker_mcp.runs import environments

    found = asked.environment_spec
    assert found is not None
    try:
        await anyio.to_thread.run_sync(environments.check, found)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return False
    findings.warn(
        f"The environment {found.name} runs in the run's worker without a jail: it is installed "
        "code, and trusted like the rest of it."
    )
    return True


def _settled(
    asked: RlArguments,
    reward: dict[str, Any] | None,
    reward_sha256: str | None,
    price: Price | None,
) -> RlOptions:
    return RlOptions(
        **asked.model_dump(exclude={"reward", "environment"}),
        reward=reward,
        reward_sha256=reward_sha256,
        environment=asked.environment_spec,
        prefill_usd_per_million=price.prefill if price else None,
        sample_usd_per_million=price.sample if price else None,
    )


def _kept(reward: specs.RewardSpec, settings: Settings) -> tuple[dict[str, Any], str | None]:
    """A reward as it is kept: a file by its whole path, with its hash. Blocks."""
    dumped = reward.model_dump(mode="json", by_alias=True)
    if not isinstance(reward, specs.UserFile):
        return dumped, None
    path = roots.allowed(reward.path, settings)
    return {**dumped, "path": str(path)}, _sha256(path)


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None  # opening it will say what is wrong


async def _try(
    reward: specs.RewardSpec, prompts: Sequence[Prompt], settings: Settings, findings: Findings
) -> bool:
    """Score answers to the first rows; whether anything could be scored."""
    if isinstance(reward, specs.Judge) or not prompts:
        return True  # a judge costs, and needs its model
    rows = [prompt.row for prompt in prompts[:_TRIED_ROWS]]
    column = getattr(reward, "column", None)
    texts = [answer_of(row, column) or "An answer." for row in rows]
    try:
        with opening.opened(reward, settings) as opened:
            completions = [Completion(text, tokens=len(text) // 4 + 1) for text in texts]
            scored: Sequence[Scored] = await opened.score(completions, rows)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return False
    errors = [one.error for one in scored if one.error is not None]
    if len(errors) == len(scored):
        findings.refuse(
            f"The reward scores none of the {len(rows)} rows it was tried on: {errors[0][:300]}",
            "Call test_reward with this data, and mend the reward or the rows.",
        )
        return False
    if errors:
        findings.warn(
            f"The reward failed on {len(errors)} of the {len(rows)} rows it was tried on: "
            f"{errors[0][:200]}; such samples are left out."
        )
    return True


# What it will take


@dataclass(frozen=True)
class Tokens:
    """Of a whole run, if each answer has `answer` tokens."""

    prefill: float
    sample: float
    train: float

    @property
    def as_told(self) -> Mapping[str, int]:
        """For an estimate."""
        told = {"prefill": self.prefill, "sample": self.sample, "train": self.train}
        rounded = {name: round(value) for name, value in told.items()}
        return {**rounded, "total": sum(rounded.values())}

    def usd(self, price: Price, train_price: float) -> float | None:
        """What that costs; None where a price is unknown."""
        if price.prefill is None or price.sample is None:
            return None
        paid = self.prefill * price.prefill + self.sample * price.sample
        return (paid + self.train * train_price) / 1e6


def tokens(
    options: RlOptions,
    steps: int,
    batch_size: int,
    prompt_tokens: float,
    evaluations: int,
    held_out: int,
    *,
    is_high: bool,
) -> Tokens:
    """What a run's steps and evaluations take, at a quarter of max_tokens or all of it.

    Args:
        prompt_tokens: The mean of a prompt.
        held_out: Prompts of an evaluation.
    """
    answer = options.max_tokens * (1.0 if is_high else _LOW_SHARE)
    samples = steps * batch_size * options.group_size
    first = steps * batch_size + evaluations * held_out
    prefill = prompt_tokens * (first + CACHED_SHARE * (samples - steps * batch_size))
    train = samples * (prompt_tokens + answer)
    if options.kl_coef:
        prefill += train  # the penalty scores each sample under the start
    return Tokens(prefill, (samples + evaluations * held_out) * answer, train)
