"""Which run is meant: by its id, its name, or the beginning of its id."""

from __future__ import annotations

from collections.abc import Sequence

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.store.rows import RunRow

_SHOWN = 3
_SHOWN_TO_CHOOSE = 10


def fitting(rows: Sequence[RunRow], text: str) -> list[RunRow]:
    """The run of this id; where there is none, those of this name, else those that begin so."""
    own = [row for row in rows if row.run_id == text]
    named = own or [row for row in rows if RunSpec.model_validate_json(row.spec).name == text]
    return named or [row for row in rows if text and row.run_id.startswith(text)]


def only(found: Sequence[RunRow]) -> RunRow | None:
    """The one that was found, or None.

    Raises:
        InvalidInputError: There are several.
    """
    if len(found) > 1:
        raise InvalidInputError(
            f"{len(found)} runs fit: {ids(found, _SHOWN_TO_CHOOSE)}.",
            next_step="Name one by its id.",
        )
    return found[0] if found else None


def ids(rows: Sequence[RunRow], shown: int = _SHOWN) -> str:
    """The first few of them, for a sentence."""
    more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
    return ", ".join(row.run_id for row in rows[:shown]) + more
