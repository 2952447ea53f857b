"""What is wrong with a row, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tinker_mcp.errors import InvalidInputError

Category = Literal[
    "broken",
    "unknown_format",
    "bad_message",
    "role_order",
    "no_reply",
    "empty_reply",
    "equal_pair",
    "bad_pair",
    "bad_text",
    "duplicate",
    "over_length",
    "not_rendered",
]

_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Problem:
    """Why a row was refused."""

    place: str
    what: str
    category: Category = "broken"

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def refuse(problems: Sequence[Problem], total: int) -> InvalidInputError:
    """The error that tells of unusable rows."""
    shown = "\n".join(f"- {str(problem)[:200]}" for problem in problems[:_SHOWN_PROBLEMS])
    more = len(problems) - _SHOWN_PROBLEMS
    return InvalidInputError(
        f"{len(problems)} of {total} conversations cannot be used:\n{shown}"
        + (f"\n- and {more} more" if more > 0 else ""),
        next_step="\nMend them, or call again with skip_invalid=true to leave them out.",
    )
