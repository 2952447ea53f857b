"""What an rl run needs settled: its reward, tried on a few rows, or its environment; its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.runs.planning import checks, prompt_sets
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.checks import Base
from tinker_mcp.runs.planning.estimate import Estimate, evaluations
from tinker_mcp.runs.planning.findings import Findings
from tinker_mcp.runs.planning.material import Material
from tinker_mcp.runs.planning.sets import LONGEST
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.rl_options import CACHED_SHARE, EnvironmentSpec, RlArguments, RlOptions
from tinker_mcp.runs.spec import DataFacts, RunSpec
from tinker_mcp.settings import Settings
from tinker_mcp.training import roots
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.prices import Price
from tinker_mcp.training.rewards import opening, specs
from tinker_mcp.training.rewards.contract import Completion, Scored
from tinker_mcp.training.rewards.rows import answer_of

_TRIED_ROWS = 3
_GROUPS = 16  # a batch, where an environment does not say how many prompts it has
_SAMPLES = "sampled_tokens"
_LOW_SHARE = 0.25  # of max_tokens, in the low estimate
_NOT_MEASURED = "not measured for rl; the first steps of the run tell"


@dataclass(frozen=True)
class RlMaterial:
    """What an rl run is made of."""

    material: Material
    options: RlOptions
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]


async def material(
    settings: Settings,
    arguments: RunArguments,
    backend: Backend,
    base: Base,
    price: Price | None,
    findings: Findings,
) -> RlMaterial | None:
    """Prompts and options; None where they cannot be used, which `findings` says."""
    asked = arguments.rl
    if asked is None:
        return None
    if asked.environment is not None:
        return await _of_environment(arguments, asked, backend, base, price, findings)
    found = await anyio.to_thread.run_sync(
        prompt_sets.build, settings, arguments, backend, base, asked.max_tokens, findings
    )
    prompts = found.train.prompts if found else ()
    settled = await options(arguments, prompts, settings, price, findings)
    if found is None or settled is None:
        return None
    held_out = found.held_out
    made = Material(
        train=found.train.facts,
        held_out=held_out.facts if held_out else None,
        units=len(prompts),
        renderer=found.renderer.name,
        max_length=found.max_length,
        train_on_what=_SAMPLES,
    )
    return RlMaterial(made, settled, prompts, held_out.prompts if held_out else ())


async def _of_environment(
    arguments: RunArguments,
    asked: RlArguments,
    backend: Backend,
    base: Base,
    price: Price | None,
    findings: Findings,
) -> RlMaterial | None:
    model = await anyio.to_thread.run_sync(
        checks.renderer, backend, base.model_name, arguments.renderer, findings
    )
    if not await _has_environment(asked.environment_spec, findings) or model is None:
        return None
    limit = base.limit or LONGEST
    spec = asked.environment_spec
    made = Material(
        train=DataFacts(
            source=spec.name if spec else "", sha256="", datums=1, tokens=0, trained_tokens=0
        ),
        held_out=None,
        units=arguments.batch_size or _GROUPS,
        renderer=model.name,
        max_length=min(arguments.max_length or limit, limit),
        train_on_what=_SAMPLES,
    )
    return RlMaterial(made, _settled(asked, None, None, price), (), ())


async def options(
    arguments: RunArguments,
    prompts: Sequence[Prompt],
    settings: Settings,
    price: Price | None,
    findings: Findings,
) -> RlOptions | None:
    """The options, settled; the reward was tried. None where it cannot be used."""
    asked = arguments.rl
    if asked is None or asked.reward is None:
        return None
    try:
        reward = specs.spec_of(asked.reward)
        dumped, sha256 = await anyio.to_thread.run_sync(_kept, reward, settings)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return None
    if not await _try(reward, prompts, settings, findings):
        return None
    return _settled(asked, dumped, sha256, price)


async def _has_environment(found: EnvironmentSpec | None, findings: Findings) -> bool:
    from tinker_mcp.runs.policy import environments, group_sources

    if found is None:
        return False
    try:
        await anyio.to_thread.run_sync(environments.check, found)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return False
    findings.warn(
        f"The environment {found.name} runs in the run's worker without a jail: it is installed "
        "code, and trusted like the rest of it."
    )
    has_held_out = await anyio.to_thread.run_sync(environments.holds_out, found)
    if has_held_out is None:
        findings.warn(
            f"What {found.name} holds out is evaluated, which the estimate does not count; get_run "
            "warns once it is known that it holds nothing out."
        )
    elif not has_held_out:
        findings.warn(group_sources.NO_HELD_OUT.format(name=found.name))
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


def estimate(spec: RunSpec, price: Price | None) -> Estimate:
    """What a run takes: an answer has a quarter of max_tokens at the low end, all at the high."""
    options = spec.rl
    if options is None:
        raise ValueError(f"{spec.method} has no rl options")
    low, high = (_tokens(spec, options, share) for share in (_LOW_SHARE, 1.0))
    told = {name: round(count) for name, count in vars(low).items()}
    tokens = {**told, "total": sum(told.values())}
    if spec.backend == "local":
        return Estimate("local", tokens, 0.0, 0.0, None, None, _NOT_MEASURED)
    if price is None or price.prefill is None or price.sample is None:
        return Estimate("hosted", tokens, None, None, price)
    again = 1 + min(spec.save_every or spec.steps, spec.steps) / spec.steps  # with one crash
    dearer = price.train_at_most / price.train if price.train else 1.0
    return Estimate(
        "hosted",
        tokens,
        usd_low=low.usd(price),
        usd_high=high.usd(price) * again * dearer,
        price=price,
    )


@dataclass(frozen=True)
class _Tokens:
    """Of a whole run."""

    prefill: float
    sample: float
    train: float

    def usd(self, price: Price) -> float:
        """What they cost; all prices are known."""
        paid = self.prefill * (price.prefill or 0.0) + self.sample * (price.sample or 0.0)
        return (paid + self.train * price.train) / 1e6


def _tokens(spec: RunSpec, options: RlOptions, share: float) -> _Tokens:
    """Each answer takes a share of max_tokens; of an environment's prompts no more is known."""
    answer = options.max_tokens * share
    held_out = spec.held_out.datums if spec.held_out else 0
    prompt = spec.train.tokens / spec.train.datums or options.max_tokens
    groups = spec.steps * spec.batch_size
    samples = groups * options.group_size
    asked = (evaluations(spec.steps, spec.eval_every) if held_out else 0) * held_out
    train = samples * (prompt + answer)
    prefill = prompt * (groups + asked + CACHED_SHARE * (samples - groups))
    if options.kl_coef:
        prefill += train  # the penalty scores each sample under the start
    return _Tokens(prefill, (samples + asked) * answer, train)
