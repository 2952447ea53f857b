"""What a run works on, in its folder: datums of sft and dpo, prompts of all others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs import data, prompts
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.spec import DATUM_METHODS, DataFacts, Method, RunSpec

if TYPE_CHECKING:
    import tinker


def save(
    folder: RunFolder, method: Method, which: Literal["train", "held_out"], rows: Sequence[Any]
) -> str:
    """Write a set; the sha256 of its file, or nothing where there is no set. Blocks."""
    if not rows:
        return ""  # an environment brings its own
    if method in DATUM_METHODS:
        path = folder.train_data if which == "train" else folder.held_out_data
        return data.save(path, rows)
    name = prompts.TRAIN if which == "train" else prompts.HELD_OUT
    return prompts.save(folder.train_data.with_name(name), rows)


def load_datums(
    folder: Path, spec: RunSpec
) -> tuple[Sequence[tinker.Datum], Sequence[tinker.Datum]]:
    """Both sets of sft or dpo. Blocks.

    Raises:
        InvalidInputError: A file is gone, or another one than the run was planned with.
    """
    own = RunFolder(folder)
    train = _datums(own.train_data, spec.train)
    return train, _datums(own.held_out_data, spec.held_out) if spec.held_out else ()


def _datums(path: Path, facts: DataFacts) -> Sequence[tinker.Datum]:
    """The datums of a file, if it still is what the run was planned with."""
    again = "Call start_run again with the data it was started with."
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidInputError(
            f"Its data {str(path)!r} cannot be read: {error.strerror}.", next_step=again
        ) from error
    if sha256 != facts.sha256:
        raise InvalidInputError(
            f"Its data {str(path)!r} was changed since the run was started.", next_step=again
        )
    return data.load(path)
