"""Files and inline values to conversations; each error names the line.

A conversation is a JSON object with `messages`, a list of {"role", "content"}. Knows JSONL and
roles; knows nothing of tokens.
"""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_mcp.errors import InvalidInputError, NotFoundError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Conversation:
    """Messages, and the place they came from, as errors name it."""

    place: str
    messages: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Problem:
    """Why a row was refused."""

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def read_file(name: str) -> tuple[list[Conversation], list[Problem]]:
    """Conversations of a JSONL file, one object a line, and the lines that hold none.

    Args:
        name: Its path; `~` is the home folder.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It is a folder or a device, empty, or cannot be read.
    """
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            raise InvalidInputError(f"{name!r} is a folder.", next_step="Name a JSONL file in it.")
        if not path.exists():
            raise NotFoundError(
                f"No file {str(path)!r}.",
                next_step="Give an absolute path to a JSONL file, or pass conversations inline.",
            )
        if not path.is_file():  # a device or a pipe may never end
            raise InvalidInputError(f"{name!r} is no regular file.", next_step="Name a JSONL file.")
        rows = list(_lines(path))
    except (OSError, RuntimeError) as error:  # no permission, too long; no home of that user
        raise InvalidInputError(
            f"{name!r} cannot be read: {error}.", next_step="Name a JSONL file that can be read."
        ) from error
    if not rows:
        raise InvalidInputError(
            f"{str(path)!r} is empty.", next_step='Write one {"messages": [...]} a line.'
        )
    return _sort_out(rows)


def read_inline(
    rows: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]],
) -> tuple[list[Conversation], list[Problem]]:
    """Conversations given in a call: objects with `messages`, or bare lists of messages.

    Raises:
        InvalidInputError: There is none.
    """
    if not rows:
        raise InvalidInputError(
            "conversations is empty.", next_step="Give at least one list of messages."
        )
    return _sort_out(
        (f"conversations[{index}]", row if isinstance(row, Mapping) else {"messages": row})
        for index, row in enumerate(rows)
    )


def refuse(problems: Sequence[Problem], total: int) -> InvalidInputError:
    """The error that tells of unusable rows."""
    shown = "\n".join(f"- {str(problem)[:200]}" for problem in problems[:_SHOWN_PROBLEMS])
    more = len(problems) - _SHOWN_PROBLEMS
    return InvalidInputError(
        f"{len(problems)} of {total} conversations cannot be used:\n{shown}"
        + (f"\n- and {more} more" if more > 0 else ""),
        next_step="\nMend them, or call again with skip_invalid=true to leave them out.",
    )


def split(
    conversations: Sequence[Conversation], eval_share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Set aside a share for evaluation, chosen by `seed`; the order is kept on both sides.

    Raises:
        InvalidInputError: Nothing would be left on one side.
    """
    if eval_share == 0:
        return list(conversations), []
    held_out = round(len(conversations) * eval_share)
    if not 0 < held_out < len(conversations):
        raise InvalidInputError(
            f"eval_share {eval_share} of {len(conversations)} conversations is {held_out}.",
            next_step="Choose a share that leaves at least one on each side, or 0.",
        )
    chosen = set(random.Random(seed).sample(range(len(conversations)), held_out))  # noqa: S311
    train = [c for index, c in enumerate(conversations) if index not in chosen]
    return train, [conversations[index] for index in sorted(chosen)]


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, parsed line or the Problem it has) of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                place = f"line {number}"
                # Without its end, after which a parser would count columns from 1 again.
                yield place, _parsed(place, text.rstrip(b"\r\n"))


def _parsed(place: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        bad = line[error.start]
        return Problem(place, f"not UTF-8 text: byte 0x{bad:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        return Problem(place, f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        return Problem(place, f"JSON that cannot be read: {str(error)[:80]}")


def _sort_out(rows: Any) -> tuple[list[Conversation], list[Problem]]:
    conversations, problems = [], []
    for place, row in rows:
        problem = row if isinstance(row, Problem) else _problem(place, row)
        if problem is None:
            conversations.append(Conversation(place, row["messages"]))
        else:
            problems.append(problem)
    return conversations, problems


def _problem(place: str, row: Any) -> Problem | None:
    if not isinstance(row, Mapping) or "messages" not in row:
        keys = f" with {sorted(row)[:6]}" if isinstance(row, Mapping) else ""
        return Problem(place, f'no "messages" in this {type(row).__name__}{keys}')
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return Problem(place, '"messages" is not a list with at least one message')
    for index, message in enumerate(messages):
        what = _message_problem(message) or _order_problem(messages, index)
        if what:
            return Problem(place, f"messages[{index}]: {what}")
    if not any(message["role"] == "assistant" for message in messages):
        return Problem(place, "no assistant message, so nothing to train on")
    return None


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        return 'not an object with "role" and "content"'
    if message["role"] not in ROLES:
        return f"role {message['role']!r} is none of {', '.join(ROLES)}"
    has_calls = bool(message.get("tool_calls"))
    content = "" if has_calls and message["content"] is None else message["content"]
    if not isinstance(content, (str, list)):
        return f"content is {type(content).__name__}, not text"
    if not isinstance(content, str):
        for index, part in enumerate(content):
            if not _is_text_part(part):
                return f"content[{index}] is no {{type: text, text: ...}}: {str(part)[:60]!r}"
    if message["role"] == "assistant" and _is_blank(content) and not has_calls:
        return "the assistant's content is empty"
    return None


def _is_blank(content: str | list[Any]) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return all(not str(part[part["type"]]).strip() for part in content)


def _is_text_part(part: Any) -> bool:
    """A renderer leaves out parts that it does not know without a word."""
    if not isinstance(part, Mapping) or part.get("type") not in ("text", "thinking"):
        return False
    return isinstance(part.get(part["type"]), str)


def _order_problem(messages: Sequence[Mapping[str, Any]], index: int) -> str | None:
    role = messages[index]["role"]
    before = messages[index - 1]["role"] if index else None
    if role in ("system", "developer") and before not in (None, "system", "developer"):
        return f"{role} after {before}; it must come first"
    if role == before and role in ("user", "assistant"):
        return f"{role} follows {role}; turns must alternate"
    if role == "assistant" and before in (None, "system", "developer"):
        return "the assistant speaks before any user"
    if role == "tool" and before not in ("assistant", "tool"):
        return f"tool follows {before}; it must answer an assistant's call"
    return None
