"""What a row of data offers a reward's test: prompt, real completions, the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinker_mcp.training.rewards.contract import Row

_PROMPTS = ("prompt", "question", "problem", "instruction")
_ANSWERS = ("answer", "expected", "target", "solution", "label")
_COMPLETIONS = ("completion", "response", "output")


def prompt_of(row: Row) -> str | None:
    """The prompt as text: of messages, what the user said last."""
    for name in _PROMPTS:
        if isinstance(row.get(name), str):
            return str(row[name])
    for name in ("messages", "prompt"):
        said = [m for m in _messages(row.get(name)) if m.get("role") == "user"]
        if said and isinstance(said[-1].get("content"), str):
            return str(said[-1]["content"])
    return None


def completions_of(row: Row) -> list[str]:
    """The real completions that the row holds: `completions`, a `completion`, or the reply."""
    if isinstance(row.get("completions"), list):
        return [text for text in row["completions"] if isinstance(text, str)]
    for name in _COMPLETIONS:
        if isinstance(row.get(name), str):
            return [str(row[name])]
    messages = _messages(row.get("messages"))
    if messages and messages[-1].get("role") == "assistant":
        content = messages[-1].get("content")
        return [content] if isinstance(content, str) else []
    return []


def answer_of(row: Row, column: str | None) -> str | None:
    """The expected answer: of the reward's own column, or of one with a usual name."""
    for name in (column, *_ANSWERS):
        value = row.get(name) if name else None
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    return None


def group_of(row: Row, index: int) -> str:
    """The group its completions belong to: `group_id`, else the same prompt."""
    return str(row.get("group_id") or prompt_of(row) or index)


def _messages(value: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list):
        return []
    return [message for message in value if isinstance(message, Mapping)]
