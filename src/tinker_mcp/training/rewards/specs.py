"""Which rewards there are, as JSON: a `type` and its arguments."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tinker_mcp.errors import InvalidInputError


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Expecting(_Spec):
    """A reward that compares: with `expected` where it is given, else with a column of the row."""

    column: str = "answer"
    expected: str | None = None


class ExactMatch(_Expecting):
    """1 where the completion is the expected text, outer spaces aside; else 0."""

    type: Literal["exact_match"]
    ignore_case: bool = False
    last_line: bool = False


class Number(_Spec):
    """1 where the last number of the completion is the expected one within a tolerance; else 0."""

    type: Literal["number"]
    column: str = "answer"
    expected: float | None = None
    tolerance: float = Field(default=1e-6, ge=0)
    relative: float = Field(default=0.0, ge=0)


class Regex(_Spec):
    """1 where the pattern is found; with a column, where its first group is that column's text."""

    type: Literal["regex"]
    pattern: str = Field(min_length=1)
    column: str | None = None


class Math(_Expecting):
    """1 where math-verify finds the completion's answer equal to the expected one; else 0."""

    type: Literal["math"]


class JsonSchema(_Spec):
    """1 where the completion, or its last fenced block, is JSON that fits the schema; else 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    type: Literal["json_schema"]
    expected: dict[str, Any] | None = Field(default=None, alias="schema")
    column: str = "schema"


class Length(_Spec):
    """With a target: 1 there, falling by the relative distance to 0; else 1 between min and max."""

    type: Literal["length"]
    unit: Literal["characters", "tokens"] = "characters"
    target: int | None = Field(default=None, ge=1)
    min: int | None = Field(default=None, ge=0)
    max: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _says_something(self) -> Length:
        if (self.target is None) == (self.min is None and self.max is None):
            raise ValueError("give either target, or min or max or both")
        return self


class UnitTests(_Spec):
    """Runs the completion's last fenced block against the row's tests: 1 where all pass.

    Attributes:
        column: Text or a list of texts with `assert` lines (with `entry_point` in the row:
            HumanEval's `check`), or a list of {"input", "output"}: standard input and output, or
            with "func_name" the arguments and the result of a function (LiveCodeBench).
        partial: The share of tests passed instead.
    """

    type: Literal["unit_tests"]
    column: str = "tests"
    timeout_s: float = Field(default=10.0, gt=0, le=60)
    partial: bool = False


class Judge(_Spec):
    """A model's grade, scaled to 0..1.

    Attributes:
        base_model: The judge: a base model, or the one that `checkpoint` was trained from.
        template: What the judge is asked; {prompt}, {completion} and {<column>} are filled in.
        low, high: The grades it may give; the last "Score: n" of its answer counts.
    """

    type: Literal["judge"]
    base_model: str | None = None
    checkpoint: str | None = None
    renderer: str | None = None
    template: str | None = None
    low: float = 0.0
    high: float = 10.0
    max_tokens: int = Field(default=512, ge=1, le=4096)

    @model_validator(mode="after")
    def _is_possible(self) -> Judge:
        if (self.base_model is None) == (self.checkpoint is None):
            raise ValueError("give either base_model or checkpoint")
        if self.low >= self.high:
            raise ValueError("low must be below high")
        if self.template is not None and "{completion}" not in self.template:
            raise ValueError("template must contain {completion}")
        return self


class UserFile(_Spec):
    """A Python file with `reward(completion, row)` or `reward_batch(completions, rows)`."""

    type: Literal["file"]
    path: str
    timeout_s: float = Field(default=10.0, gt=0, le=600)


RewardSpec: TypeAlias = Annotated[
    ExactMatch | Number | Regex | Math | JsonSchema | Length | UnitTests | Judge | UserFile,
    Field(discriminator="type"),
]
_ADAPTER: TypeAdapter[RewardSpec] = TypeAdapter(RewardSpec)
TYPES = (
    "exact_match",
    "number",
    "regex",
    "math",
    "json_schema",
    "length",
    "unit_tests",
    "judge",
    "file",
)


def spec_of(reward: str | dict[str, Any]) -> RewardSpec:
    """The reward an agent names: the path of a Python file, or an object with its `type`.

    Raises:
        InvalidInputError: It is none.
    """
    if isinstance(reward, str):
        reward = _decoded(reward)
    try:
        return _ADAPTER.validate_python(reward)
    except ValidationError as error:
        problems = "; ".join(_told(item) for item in error.errors()[:4])
        raise InvalidInputError(
            f"The reward cannot be used: {problems}.",
            next_step='Give the path of a Python file, or {"type": ...} with one of '
            f"{', '.join(TYPES)} and its arguments.",
        ) from error


def _decoded(reward: str) -> dict[str, Any]:
    """An object that came as JSON text, as some hosts send them; any other text is a path."""
    if reward.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            decoded: dict[str, Any] = json.loads(reward)
            return decoded
    return {"type": "file", "path": reward}


def _told(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    return f"{place}: {item['msg']}" if place else str(item["msg"])
