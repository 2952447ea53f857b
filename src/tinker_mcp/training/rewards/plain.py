"""Built-in rewards that need no jail: no completion can make them slow or do anything."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tinker_mcp.training.rewards.contract import Completion, Row, Scored
from tinker_mcp.training.rewards.specs import ExactMatch, Length, Number

Rule: TypeAlias = Callable[[Completion, Row], Scored]

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?:\.\d{1,300})?(?:[eE][-+]?\d{1,3})?"
)
_MAX_CHARACTERS = 100_000  # an answer's last number stands at its end


class PlainReward:
    """A rule, applied to each sample in this process."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    async def score(
        self, completions: Sequence[Completion], rows: Sequence[Row]
    ) -> Sequence[Scored]:
        """One result a completion, in order."""
        return [self._rule(*pair) for pair in zip(completions, rows, strict=True)]

    def close(self) -> None:
        """There is nothing to end."""


def exact_match(spec: ExactMatch) -> Rule:
    """The rule of a specification."""

    def shaped(text: str) -> str:
        return text.strip().casefold() if spec.ignore_case else text.strip()

    def rule(completion: Completion, row: Row) -> Scored:
        wanted = spec.expected if spec.expected is not None else row.get(spec.column)
        if wanted is None:
            return _missing(spec.column)
        text = completion.text.strip()
        said = text.rpartition("\n")[2] if spec.last_line else text
        return Scored(float(shaped(said) == shaped(str(wanted))))

    return rule


def number(spec: Number) -> Rule:
    """The rule of a specification."""

    def rule(completion: Completion, row: Row) -> Scored:
        wanted = spec.expected if spec.expected is not None else _as_number(row.get(spec.column))
        if wanted is None:
            if row.get(spec.column) is None:
                return _missing(spec.column)
            return Scored.failed(f"the row's {spec.column!r} is no number")
        said = _as_number(completion.text)
        if said is None:
            return Scored(0.0)
        near = math.isclose(said, wanted, rel_tol=spec.relative, abs_tol=spec.tolerance)
        return Scored(float(near))

    return rule


def length(spec: Length) -> Rule:
    """The rule of a specification."""

    def rule(completion: Completion, row: Row) -> Scored:
        count = completion.tokens if spec.unit == "tokens" else len(completion.text)
        if count is None:
            return Scored.failed("how many tokens it has is not known")
        if spec.target is not None:
            return Scored(max(0.0, 1.0 - abs(count - spec.target) / spec.target))
        low, high = spec.min or 0, math.inf if spec.max is None else spec.max
        return Scored(float(low <= count <= high))

    return rule


def _as_number(value: Any) -> float | None:
    """A number as it stands, or the last one in a text; None for none that is finite."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        found = float(value)
    else:
        numbers = _NUMBER.findall(str(value)[-_MAX_CHARACTERS:])
        found = float(numbers[-1].replace(",", "")) if numbers else math.nan
    return found if math.isfinite(found) else None


def _missing(column: str) -> Scored:
    return Scored.failed(f"the row has no {column!r}")
