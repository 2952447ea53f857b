"""What a reward is: completions and their rows in, a value or the reason for none out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Row: TypeAlias = Mapping[str, Any]
"""One row of the data: the prompt and whatever columns the reward needs."""


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    Attributes:
        text: The answer as text, without the prompt.
        tokens: How many tokens it has, where that is known.
    """

    text: str
    tokens: int | None = None


@dataclass(frozen=True)
class Scored:
    """A sample's reward, or why it has none; such a sample is left out, it never counts as 0."""

    value: float | None
    error: str | None = None

    @classmethod
    def failed(cls, error: str) -> Scored:
        """No value, and a sentence why."""
        return cls(None, error)

    @classmethod
    def of(cls, value: object) -> Scored:
        """A number as a value; anything else, NaN and the infinities as an error."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return cls.failed(f"it returned {type(value).__name__}, not a number")
        try:
            number = float(value)
        except OverflowError:
            return cls.failed("it returned a number too large for a float")
        if not math.isfinite(number):
            return cls.failed(f"it returned {number}")
        return cls(number)


class Reward(Protocol):
    """Scores completions; open until `close`."""

    async def score(
        self, completions: Sequence[Completion], rows: Sequence[Row]
    ) -> Sequence[Scored]:
        """One result a completion, in order; raises nothing that one sample could cause."""
        ...

    def close(self) -> None:
        """End what it has started."""
        ...
