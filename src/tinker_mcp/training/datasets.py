"""Files and inline rows to what is trained on; each problem names its line."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import files, formats
from tinker_mcp.training.files import Row
from tinker_mcp.training.formats import Columns, Example
from tinker_mcp.training.problems import Problem

T = TypeVar("T")


def read_file(
    path: Path, name: str, kind: str = "supervised", columns: Columns | None = None
) -> tuple[list[Example], list[Problem]]:
    """What a file holds for a kind of datums, and the rows that hold none.

    Args:
        path: The file.
        name: As it was given, for errors.
        columns: Where its columns have other names than the layouts'.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It is a folder or a device, empty, or cannot be read.
    """
    return _sort_out(files.rows(path, name), kind, columns or {})


def read_inline(
    rows: Sequence[Any], kind: str = "supervised", columns: Columns | None = None
) -> tuple[list[Example], list[Problem]]:
    """What rows given in a call hold: objects of any layout, or bare lists of messages.

    Raises:
        InvalidInputError: There is none.
    """
    if not rows:
        raise InvalidInputError(
            "conversations is empty.", next_step="Give at least one list of messages."
        )
    placed = ((f"conversations[{index}]", row) for index, row in enumerate(rows))
    return _sort_out(placed, kind, columns or {})


def split(rows: Sequence[T], eval_share: float, seed: int) -> tuple[list[T], list[T]]:
    """Set aside a share for evaluation, chosen by `seed`; the order is kept on both sides.

    Raises:
        InvalidInputError: Nothing would be left on one side.
    """
    if eval_share == 0:
        return list(rows), []
    held_out = round(len(rows) * eval_share)
    if not 0 < held_out < len(rows):
        raise InvalidInputError(
            f"eval_share {eval_share} of {len(rows)} conversations is {held_out}.",
            next_step="Choose a share that leaves at least one on each side, or 0.",
        )
    chosen = set(random.Random(seed).sample(range(len(rows)), held_out))  # noqa: S311
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def _sort_out(
    rows: Iterable[Row], kind: str, columns: Columns
) -> tuple[list[Example], list[Problem]]:
    examples: list[Example] = []
    problems: list[Problem] = []
    for place, row in rows:
        found = (
            row
            if isinstance(row, Problem)
            else formats.of_kind(place, formats.mapped(row, columns), kind)
        )
        if isinstance(found, Problem):
            problems.append(found)
        else:
            examples.append(found)
    return examples, problems
