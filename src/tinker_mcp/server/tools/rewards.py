"""test_reward."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    Number,
    ToolContext,
    Whole,
    rounded,
    workspace_of,
)
from tinker_mcp.settings import Settings
from tinker_mcp.training import files, roots, samplers
from tinker_mcp.training.problems import Problem
from tinker_mcp.training.rendering import ModelRenderer
from tinker_mcp.training.rewards import opening, trial
from tinker_mcp.training.rewards.contract import Reward, Row
from tinker_mcp.training.rewards.judge import JudgeReward
from tinker_mcp.training.rewards.specs import Judge, RewardSpec, UserFile, spec_of
from tinker_mcp.training.rewards.trial import Trial
from tinker_mcp.training.samplers import Sampler, Source

_MAX_CASES = 200
_CASES_SHOWN = 50
_ERRORS_SHOWN = 5


class RewardCase(BaseModel):
    model_config = ConfigDict(extra="forbid")

    completion: str
    row: dict[str, Any] = {}
    expected: Number | None = None


class CaseResult(BaseModel):
    value: float | None
    expected: float | None
    ok: bool | None
    error: str | None = None


class GameResult(BaseModel):
    mean: float | None
    rows: int
    as_good_as_honest: int


class TestedReward(BaseModel):
    finished: bool
    warnings: list[str] = []
    cases: list[CaseResult] = []
    samples: int = 0
    errors: dict[str, int] = {}
    distribution: dict[str, Any] | None = None
    groups: dict[str, int] | None = None
    games: dict[str, GameResult] = {}
    samples_per_s: float | None = None
    next_step: str


async def test_reward(
    ctx: ToolContext,
    reward: Annotated[
        str | dict[str, Any],
        Field(
            description="A Python file with reward(completion, row) -> float, or "
            '{"type": "number", "column": "answer", "tolerance": 0.01}; types: exact_match, number,'
            " regex, math, json_schema, length, unit_tests, judge."
        ),
    ],
    cases: list[RewardCase] | None = None,
    data: Annotated[
        str | None, Field(description="A file: its rows, and completions where it has some.")
    ] = None,
    rows: Annotated[Whole, Field(ge=1, le=500)] = 32,
) -> TestedReward:
    """Try a reward on labelled cases and real rows before a run depends on it.

    Tells too what an empty answer or an echoed prompt earns. Only a judge spends tokens.
    """
    workspace = workspace_of(ctx)
    settings = workspace.connector.settings
    if not cases and data is None:
        raise InvalidInputError(
            "test_reward has nothing to score.",
            next_step='Give data=path, or cases=[{"completion": ..., "row": {}, "expected": 1}].',
        )
    if len(cases or []) > _MAX_CASES:
        raise InvalidInputError(
            f"{len(cases or [])} cases are more than {_MAX_CASES}.",
            next_step="Write them to a file and give data=path.",
        )
    spec = spec_of(reward)
    read = await anyio.to_thread.run_sync(_rows, data, rows, settings)
    known = [trial.Case(case.completion, case.row, case.expected) for case in cases or []]
    key = ("test_reward", _digest(spec, known, read, settings))

    async def tried(judge: Reward | None = None) -> Trial:
        with opening.opened(spec, settings, judge) as opened:
            return await trial.trial(opened, known, read, getattr(spec, "column", None))

    if isinstance(spec, Judge):
        found = await _judged(ctx, spec, key, tried)
    else:
        found = await workspace.unfinished.finish(key, tried, None, workspace.deadline())
    if found is None:
        return TestedReward(finished=False, next_step=STILL_RUNNING.format(tool="test_reward"))
    return _reply(found)


async def _judged(ctx: ToolContext, spec: Judge, key: tuple[str, str], tried: Any) -> Trial | None:
    async def use(sampler: Sampler, renderer: ModelRenderer, _: None) -> Trial:
        trial_of: Trial = await tried(JudgeReward(spec, sampler.client, renderer))
        return trial_of

    return await samplers.ask(
        workspace_of(ctx),
        Source(checkpoint=spec.checkpoint, base_model=spec.base_model),
        key=key,
        renderer_name=spec.renderer,
        render=lambda renderer: None,
        use=use,
    )


def _rows(data: str | None, count: int, settings: Settings) -> list[Row]:
    """The first rows of a file; those that are broken are errors, not left out.

    Raises:
        InvalidInputError: There is one, or it is no object.
        NotFoundError: There is no such file.
    """
    if data is None:
        return []
    found: list[Row] = []
    path = roots.allowed(data, settings)
    for place, row in itertools.islice(files.rows(path, data), count):
        if isinstance(row, Problem) or not isinstance(row, Mapping):
            what = row if isinstance(row, Problem) else f"{place}: {type(row).__name__}, no object"
            raise InvalidInputError(f"{data!r}: {what}.", next_step="Mend the row.")
        found.append(row)
    return found


def _digest(
    spec: RewardSpec, cases: Sequence[trial.Case], rows: Sequence[Row], settings: Settings
) -> str:
    """What an equal call has in common; a file that was changed makes another."""
    source = ""
    if isinstance(spec, UserFile):
        path = roots.allowed(spec.path, settings)
        source = str(path.stat().st_mtime_ns) if path.exists() else ""
    whole = [spec.model_dump(), [vars(case) for case in cases], rows, source]
    return hashlib.sha256(json.dumps(whole, default=str).encode()).hexdigest()


def _reply(found: Trial) -> TestedReward:
    spread = found.distribution
    return TestedReward(
        finished=True,
        warnings=list(found.warnings),
        cases=[
            CaseResult(
                value=None if verdict.scored.value is None else rounded(verdict.scored.value),
                expected=verdict.expected,
                ok=verdict.is_ok,
                error=verdict.scored.error,
            )
            for verdict in found.verdicts[:_CASES_SHOWN]
        ],
        samples=found.samples,
        errors=dict(sorted(found.errors.items(), key=lambda item: -item[1])[:_ERRORS_SHOWN]),
        distribution=None
        if spread is None
        else {
            "values": spread.values,
            "min": rounded(spread.minimum),
            "mean": rounded(spread.mean),
            "max": rounded(spread.maximum),
            "std": rounded(spread.std),
            "histogram": dict(spread.histogram),
        },
        groups=None if found.groups is None else dict(vars(found.groups)),
        games={
            name: GameResult(
                mean=None if game.mean is None else rounded(game.mean),
                rows=game.rows,
                as_good_as_honest=game.as_good,
            )
            for name, game in found.games.items()
        },
        samples_per_s=rounded(found.samples / found.seconds, 3) if found.seconds > 0 else None,
        next_step=_next(found),
    )


def _next(found: Trial) -> str:
    if found.warnings:
        return "Mend the reward by the warnings, then call test_reward again."
    if not found.games or all(game.rows == 0 for game in found.games.values()):
        return "Call test_reward with data=path too, to see it on real rows."
    return "Use it as the reward of a run."
