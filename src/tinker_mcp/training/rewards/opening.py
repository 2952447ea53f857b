"""From a reward's specification to one that scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.settings import Settings
from tinker_mcp.training import roots
from tinker_mcp.training.rewards import plain
from tinker_mcp.training.rewards.cell import Limits, Program
from tinker_mcp.training.rewards.contract import Reward
from tinker_mcp.training.rewards.pool import JailedReward
from tinker_mcp.training.rewards.specs import (
    ExactMatch,
    JsonSchema,
    Judge,
    Length,
    Math,
    Number,
    Regex,
    RewardSpec,
    UnitTests,
    UserFile,
)

_MAX_SOURCE_BYTES = 2**20
_GRADER_WALL_S = 5.0
_MARGIN_S = 5.0  # for the keeper to answer after a worker took all its time


@contextmanager
def opened(spec: RewardSpec, settings: Settings, judge: Reward | None = None) -> Iterator[Reward]:
    """The reward of a specification; its processes end with the block.

    Args:
        judge: What scores where the specification is a judge: it needs a sampling client.

    Raises:
        InvalidInputError: A file lies outside the roots or is none.
    """
    reward = _made(spec, settings, judge)
    try:
        yield reward
    finally:
        reward.close()


def _made(spec: RewardSpec, settings: Settings, judge: Reward | None) -> Reward:
    match spec:
        case ExactMatch():
            return plain.PlainReward(plain.exact_match(spec))
        case Number():
            return plain.PlainReward(plain.number(spec))
        case Length():
            return plain.PlainReward(plain.length(spec))
        case Regex() | Math() | JsonSchema():
            program = Program("grader", spec.type, arguments=spec.model_dump(exclude={"type"}))
            limits = Limits(wall_s=_GRADER_WALL_S)
        case UnitTests():
            program = Program("tests", spec.type, arguments=spec.model_dump(exclude={"type"}))
            limits = Limits(wall_s=spec.timeout_s + _MARGIN_S)
        case UserFile():
            program = _file(roots.allowed(spec.path, settings), spec.path)
            limits = Limits(wall_s=spec.timeout_s)
        case Judge():
            if judge is None:
                raise InvalidInputError(
                    "A judge needs a sampling client.", next_step="Call test_reward with it."
                )
            return judge
    return JailedReward(program, limits, allow_unjailed=settings.allow_unjailed)


def _file(path: Path, name: str) -> Program:
    """The program of a user's file, read here: inside it is only text."""
    if not path.is_file():
        raise NotFoundError(
            f"No file {str(path)!r}.",
            next_step="Write a Python file with reward(completion, row) -> float there.",
        )
    try:
        with path.open("rb") as file:
            source = file.read(_MAX_SOURCE_BYTES + 1)
        if len(source) > _MAX_SOURCE_BYTES:
            raise InvalidInputError(
                f"{name!r} is larger than 1 MiB.", next_step="Give a Python file."
            )
        text = source.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"{name!r} cannot be read as Python: {str(error)[:200]}.",
            next_step="Give a Python file in UTF-8.",
        ) from error
    return Program("file", str(path), text, path.parent)
