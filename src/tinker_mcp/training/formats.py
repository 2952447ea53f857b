"""The layouts that a row may have, and each one's way to what is trained on.

A row is a JSON object; its keys say which layout it has. Knows no files and no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tinker_mcp.training import messages as checks
from tinker_mcp.training.messages import Messages
from tinker_mcp.training.problems import Problem

Layout = Literal[
    "comparison",
    "preference_pair",
    "messages",
    "sharegpt",
    "prompt_completion",
    "instruction_output",
    "text",
    "prompt",
]
"""`preference_pair`: chosen and rejected, as texts after a prompt or as lists of messages."""

Columns: TypeAlias = Mapping[str, str]
"""The layout's name of a column to its name in the file."""


@dataclass(frozen=True)
class Conversation:
    """Messages, and the place they came from, as errors name it."""

    place: str
    messages: Messages


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in the reply; the first is preferred."""

    place: str
    chosen: Messages
    rejected: Messages


@dataclass(frozen=True)
class Text:
    """Plain text, trained on from its second token to its last."""

    place: str
    text: str


Example: TypeAlias = Conversation | Pair | Text

NEEDED: Mapping[Layout, tuple[str, ...]] = {
    "comparison": ("comparison", "label"),
    "preference_pair": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "instruction_output": ("instruction", "output"),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""The columns of each layout, in the order in which they are looked for."""

OPTIONAL: Mapping[Layout, tuple[str, ...]] = {
    "preference_pair": ("prompt",),
    "sharegpt": ("system",),
    "instruction_output": ("input", "system"),
    "prompt_completion": ("system",),
}

LAYOUTS_OF_KIND: Mapping[str, tuple[Layout, ...]] = {
    "supervised": ("messages", "sharegpt", "prompt_completion", "instruction_output"),
    "text": ("text",),
    "preference": ("comparison", "preference_pair"),
}
COLUMNS = tuple(dict.fromkeys(c for t in (NEEDED, OPTIONAL) for names in t.values() for c in names))
"""All names that a mapping may use."""

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}
_SIDES = {"A": ("completion_A", "completion_B"), "B": ("completion_B", "completion_A")}


def mapped(row: Any, columns: Columns) -> Any:
    """The row with its columns under the layout's names; a bare list of messages is `messages`."""
    if isinstance(row, list):
        return {"messages": row}
    if not isinstance(row, Mapping):
        return row
    return {**row, **{name: row[theirs] for name, theirs in columns.items() if theirs in row}}


def layout(row: Any, among: Sequence[Layout] = tuple(NEEDED)) -> Layout | None:
    """The first layout whose columns the row has; an empty column (null) counts as none."""
    if not isinstance(row, Mapping):
        return None
    for name in among:
        if all(row.get(column) is not None for column in NEEDED[name]):
            return name
    return None


def preferred(columns: Columns) -> list[Layout]:
    """All layouts, first those of which a column is mapped: that is what the caller means."""
    return sorted(NEEDED, key=lambda name: not set(columns) & set(columns_of(name)))


def columns_of(name: Layout) -> tuple[str, ...]:
    """The columns that a layout uses."""
    return NEEDED[name] + OPTIONAL.get(name, ())


def example(place: str, row: Mapping[str, Any], layout: Layout) -> Example | Problem:
    """What the row holds, checked, or why it cannot be used."""
    return _CONVERSIONS[layout](place, row)


def of_kind(place: str, row: Any, kind: str) -> Example | Problem:
    """What the row holds for a kind of datums, or why it cannot be used for it."""
    found = layout(row, LAYOUTS_OF_KIND[kind])
    return unknown(place, row, kind) if found is None else example(place, row, found)


def unknown(place: str, row: Any, kind: str = "supervised") -> Problem:
    """The row has none of the layouts of a kind."""
    keys = f" with {[str(key)[:30] for key in sorted(map(str, row))[:6]]}" if _is(row) else ""
    first, *others = (NEEDED[name] for name in LAYOUTS_OF_KIND[kind])
    wanted = " and ".join(f'"{column}"' for column in first)
    more = f" (nor {', '.join('+'.join(names) for names in others)})" if others else ""
    what = f"no {wanted} in this {type(row).__name__}{keys}{more}"
    return Problem(place, what, "unknown_format")


def _is(row: Any) -> bool:
    return isinstance(row, Mapping)


def _messages(place: str, row: Mapping[str, Any]) -> Conversation | Problem:
    return _checked(place, row["messages"], "messages")


def _sharegpt(place: str, row: Mapping[str, Any]) -> Conversation | Problem:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        return Problem(place, '"conversations" is not a list with at least one turn', "bad_message")
    messages: list[Any] = _system(row)
    for index, turn in enumerate(turns):
        if isinstance(turn, Mapping) and {"from", "value"} <= set(turn):
            role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
            if role is None:
                what = f'conversations[{index}]: "from" {str(turn["from"])[:40]!r} is no known role'
                return Problem(place, what, "bad_message")
            rest = {name: turn[name] for name in ("weight",) if turn.get(name) is not None}
            messages.append({"role": role, "content": turn["value"], **rest})
        else:  # some files have role and content under this name
            messages.append(turn)
    return _checked(place, messages, "conversations")


def _prompt_completion(place: str, row: Mapping[str, Any]) -> Conversation | Problem:
    prompt = _prompt(row["prompt"])
    return _checked(place, [*_system(row), *prompt, *_reply(row["completion"])], "messages")


def _instruction_output(place: str, row: Mapping[str, Any]) -> Conversation | Problem:
    instruction, extra = row["instruction"], row.get("input")
    if isinstance(instruction, str) and isinstance(extra, str) and extra.strip():
        instruction = f"{instruction}\n\n{extra}"
    messages = [*_system(row), {"role": "user", "content": instruction}, *_reply(row["output"])]
    return _checked(place, messages, "messages")


def _text(place: str, row: Mapping[str, Any]) -> Text | Problem:
    text = row["text"]
    if not isinstance(text, str):
        return Problem(place, f'"text" is {type(text).__name__}, not text', "bad_text")
    what = checks.text_problem(text) or ("" if text.strip() else '"text" is empty')
    return Problem(place, what, "bad_text") if what else Text(place, text)


def _only_prompt(place: str, row: Mapping[str, Any]) -> Problem:
    return Problem(place, "a prompt without a reply, so nothing to train on", "no_reply")


def _preference_pair(place: str, row: Mapping[str, Any]) -> Pair | Problem:
    prompt = [] if row.get("prompt") is None else _prompt(row["prompt"])
    return _pair(place, _after(prompt, row["chosen"]), _after(prompt, row["rejected"]))


def _after(prompt: list[Any], side: Any) -> list[Any]:
    """A side's whole conversation; a side that begins itself repeats the prompt."""
    reply = _reply(side)
    begins = isinstance(reply[0], Mapping) and reply[0].get("role") != "assistant" if reply else 0
    return reply if begins else [*prompt, *reply]


def _comparison(place: str, row: Mapping[str, Any]) -> Pair | Problem:
    """The cookbook's LabeledComparison; it would read a tie as a preference for B."""
    comparison, label = row["comparison"], row["label"]
    if label not in ("A", "B"):
        return Problem(place, f"label {str(label)[:20]!r} prefers neither A nor B", "bad_pair")
    fields = ("prompt_conversation", "completion_A", "completion_B")
    if not isinstance(comparison, Mapping) or not all(
        isinstance(comparison.get(field), list) for field in fields
    ):
        what = f"comparison has not the three lists {', '.join(fields)}"
        return Problem(place, what, "bad_pair")
    chosen, rejected = (
        [*comparison["prompt_conversation"], *comparison[side]] for side in _SIDES[label]
    )
    return _pair(place, chosen, rejected)


def _pair(place: str, chosen: list[Any], rejected: list[Any]) -> Pair | Problem:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages and messages == [m for m in messages if _role(m) == "assistant"]:
            return Problem(place, f'{name} is a reply without a "prompt"', "bad_pair")
        found = checks.problem(place, messages, name)
        if found:
            return found
        if messages[-1]["role"] != "assistant":
            return Problem(place, f"{name} does not end with the assistant's reply", "bad_pair")
    if chosen == rejected:
        return Problem(place, "chosen equals rejected, so nothing is preferred", "equal_pair")
    return Pair(place, chosen, rejected)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _checked(place: str, messages: Any, name: str) -> Conversation | Problem:
    return checks.problem(place, messages, name) or Conversation(place, messages)


def _system(row: Mapping[str, Any]) -> list[Any]:
    system = row.get("system")
    return [{"role": "system", "content": system}] if system else []


def _prompt(prompt: Any) -> list[Any]:
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def _reply(reply: Any) -> list[Any]:
    return reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}]


_CONVERSIONS: Mapping[Layout, Callable[[str, Mapping[str, Any]], Example | Problem]] = {
    "comparison": _comparison,
    "preference_pair": _preference_pair,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "instruction_output": _instruction_output,
    "text": _text,
    "prompt": _only_prompt,
}
