"""Prompts of a run: a file's rows, and how they lie in the run's folder.

A row has `prompt` (text, or a list of messages) or `messages` (without the reply to come), and
whatever other columns the reward needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import files
from tinker_mcp.training import messages as checks
from tinker_mcp.training.problems import Problem

if TYPE_CHECKING:
    from tinker_mcp.runs.spec import RunSpec

TRAIN, HELD_OUT = "prompts.jsonl", "held_out_prompts.jsonl"
_ROLES_BEFORE_A_REPLY = ("user", "tool")


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, and the row that the reward looks at."""

    messages: Sequence[Mapping[str, Any]]
    row: Mapping[str, Any]


def read(path: Path, name: str, columns: Mapping[str, str]) -> tuple[list[Prompt], list[Problem]]:
    """The prompts of a file, and the rows that hold none. Blocks.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It is empty, or cannot be read.
    """
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for place, row in files.rows(path, name):
        found = row if isinstance(row, Problem) else _prompt(place, row, columns)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            prompts.append(found)
    return prompts, problems


def save(path: Path, prompts: Sequence[Prompt]) -> str:
    """Write prompts to a file that is whole or not there, for its owner only; its sha256. Blocks.

    Raises:
        InvalidInputError: A row holds what JSON cannot.
    """
    try:
        lines = [json.dumps({"messages": list(p.messages), "row": dict(p.row)}) for p in prompts]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"A row of the prompts cannot be kept as JSON: {error}.",
            next_step="Give rows of text, numbers, lists and objects.",
        ) from error
    content = "".join(f"{line}\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    number, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return hashlib.sha256(content).hexdigest()


def load(path: Path, sha256: str) -> list[Prompt]:
    """The prompts that `save` wrote. Blocks.

    Raises:
        InvalidInputError: The file cannot be read, or is another one than was saved.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _unusable(path, "was changed since the run was started")
    rows = map(json.loads, content.decode().splitlines())
    return [Prompt(row["messages"], row["row"]) for row in rows]


def load_both(folder: Path, spec: RunSpec) -> tuple[list[Prompt], list[Prompt]]:
    """A run's prompts to train on, and its held-out ones, from its folder. Blocks.

    Raises:
        InvalidInputError: A file is gone, or another one than the run was planned with.
    """
    train = load(folder / "data" / TRAIN, spec.train.sha256)
    if spec.held_out is None:
        return train, []
    return train, load(folder / "data" / HELD_OUT, spec.held_out.sha256)


def _prompt(place: str, row: Any, columns: Mapping[str, str]) -> Prompt | Problem:
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        return Problem(place, f"a {type(row).__name__}, not an object", "unknown_format")
    named = {**row, **{name: row[own] for name, own in columns.items() if own in row}}
    messages = _messages(named)
    if messages is None:
        keys = ", ".join(sorted(map(str, row))[:6])
        return Problem(place, f'no "prompt" or "messages" among {keys}', "unknown_format")
    what = _problem(messages)
    return Problem(place, what, "bad_message") if what else Prompt(messages, named)


def _messages(row: Mapping[str, Any]) -> list[Any] | None:
    """The conversation up to the reply that is to be sampled."""
    given = row.get("prompt")
    if isinstance(given, str):
        system = row.get("system")
        first = [{"role": "system", "content": system}] if isinstance(system, str) else []
        return [*first, {"role": "user", "content": given}]
    given = given if isinstance(given, list) else row.get("messages")
    if not isinstance(given, list):
        return None
    is_answered = bool(given) and isinstance(given[-1], Mapping)
    if is_answered and given[-1].get("role") == "assistant":
        return given[:-1]  # what it said is the row's business
    return given


def _problem(messages: list[Any]) -> str | None:
    if not messages:
        return "there is no message to answer"
    asked = [*messages, {"role": "assistant", "content": "x"}]
    if not any(message.get("content") for message in messages if isinstance(message, Mapping)):
        return "its messages are empty"
    found = checks.problem("", asked)
    if found is not None:
        return found.what
    if messages[-1]["role"] not in _ROLES_BEFORE_A_REPLY:
        return f"it ends with a {messages[-1]['role']}'s message, so there is nothing to answer"
    return None


def _unusable(path: Path, what: str) -> InvalidInputError:
    return InvalidInputError(
        f"The run's prompts {str(path)!r}: the file {what}.",
        next_step="Call start_run again with the data it was started with.",
    )
