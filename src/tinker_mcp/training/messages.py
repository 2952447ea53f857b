"""What a list of messages must be: roles, their order, content that a renderer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinker_mcp.training.problems import Category, Problem

ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = Sequence[Mapping[str, Any]]

_IMAGES = ("image", "image_url", "input_image")


def problem(place: str, messages: Any, name: str = "messages") -> Problem | None:
    """Why `messages` cannot be trained on, or None.

    Args:
        name: What the list is called in the row.
    """
    if not isinstance(messages, list) or not messages:
        return Problem(place, f'"{name}" is not a list with at least one message', "bad_message")
    for index, message in enumerate(messages):
        found = _message_problem(message) or _order_problem(messages, index)
        if found:
            category, what = found
            return Problem(place, f"{name}[{index}]: {what}", category)
    if not any(message["role"] == "assistant" for message in messages):
        return Problem(place, "no assistant message, so nothing to train on", "no_reply")
    return None


def message_problem(messages: Messages) -> str | None:
    """The first message that is none, by its place, and why."""
    for index, message in enumerate(messages):
        if found := _message_problem(message):
            return f"messages[{index}]: {found[1]}"
    return None


def text_problem(text: str) -> str | None:
    """Why a text cannot be tokenized: half a surrogate pair has no UTF-8."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        place = f"at position {error.start + 1}"
        if 0xDC80 <= code <= 0xDCFF:  # surrogateescape's way to keep a byte
            return f"not UTF-8 text: byte 0x{code - 0xDC00:02x} or \\u{code:04x} {place}"
        return f"half a surrogate pair, \\u{code:04x}, {place}; it stands for no character"
    return None


def _message_problem(message: Any) -> tuple[Category, str] | None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        return "bad_message", 'not an object with "role" and "content"'
    role = message["role"]
    if role not in ROLES:
        return "bad_message", f"role {str(role)[:40]!r} is none of {', '.join(ROLES)}"
    has_calls = bool(message.get("tool_calls"))
    content = "" if has_calls and message["content"] is None else message["content"]
    what = _content_problem(content) or _weight_problem(message)
    if what:
        return "bad_message", what
    if role == "assistant" and _is_blank(content) and not has_calls:
        return "empty_reply", "the assistant's content is empty"
    return None


def _content_problem(content: Any) -> str | None:
    if isinstance(content, str):
        return text_problem(content)
    if not isinstance(content, list):
        return f"content is {type(content).__name__}, not text"
    for index, part in enumerate(content):
        if isinstance(part, Mapping) and part.get("type") in _IMAGES:
            return (
                f"content[{index}] is an image, and tools take text only; images are trained on "
                "with scripts/vision_training.py"
            )
        if not _is_text_part(part):
            return f"content[{index}] is no {{type: text, text: ...}}: {str(part)[:60]!r}"
        what = text_problem(part[part["type"]])
        if what:
            return f"content[{index}]: {what}"
    return None


def _weight_problem(message: Mapping[str, Any]) -> str | None:
    weight = message.get("weight")
    if weight is None or (weight in (0, 1) and not isinstance(weight, str)):
        return None
    return f"weight {str(weight)[:20]} is neither 0 (not trained) nor 1"


def _is_blank(content: str | list[Any]) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return all(not str(part[part["type"]]).strip() for part in content)


def _is_text_part(part: Any) -> bool:
    """A renderer leaves out parts that it does not know without a word."""
    if not isinstance(part, Mapping) or part.get("type") not in ("text", "thinking"):
        return False
    return isinstance(part.get(part["type"]), str)


def _order_problem(messages: Messages, index: int) -> tuple[Category, str] | None:
    role = messages[index]["role"]
    before = messages[index - 1]["role"] if index else None
    what = None
    if role in ("system", "developer") and before not in (None, "system", "developer"):
        what = f"{role} after {before}; it must come first"
    elif role == before and role in ("user", "assistant"):
        what = f"{role} follows {role}; turns must alternate"
    elif role == "assistant" and before in (None, "system", "developer"):
        what = "the assistant speaks before any user"
    elif role == "tool" and before not in ("assistant", "tool"):
        what = f"tool follows {before}; it must answer an assistant's call"
    return ("role_order", what) if what else None
