"""The calls that stand in the prompts: found, read as an agent reads them, and made."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agents import Agent

NO_TOOLS = {"reward", "reward_batch"}  # what a reward's file defines
_CODE = re.compile(r"`([^`]+)`")
_CALL = re.compile(r"([a-z_]+)\((.*)\)(?: -> \w+)?", re.DOTALL)
_WORDS = {"true": True, "false": False}
_LEFT_OPEN: tuple[Any, ...] = (..., "...", "tinker://...")


@dataclass(frozen=True)
class Call:
    """A call in a prompt's text; what is left to the agent is `...`.

    Attributes:
        is_mention: All of its arguments are left to the agent: `sample(...)`.
    """

    tool: str
    arguments: Mapping[str, Any]
    is_mention: bool = False


def code(text: str) -> list[str]:
    """Whatever stands between backticks."""
    return _CODE.findall(text)


def calls(text: str) -> list[Call]:
    """All calls of tools, in their order."""
    matches = [_CALL.fullmatch(piece) for piece in code(text)]
    found = [(match[1], piece) for match, piece in zip(matches, code(text), strict=True) if match]
    return [_call(tool, piece) for tool, piece in found if tool not in NO_TOOLS]


def _call(tool: str, piece: str) -> Call:
    parsed = ast.parse(piece, mode="eval").body
    assert isinstance(parsed, ast.Call), piece
    arguments = {str(keyword.arg): _value(keyword.value) for keyword in parsed.keywords}
    return Call(tool, arguments, is_mention=bool(parsed.args))


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Name(name):
            return _WORDS[name]
        case ast.Dict(keys, values):
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if k}
        case ast.List(items):
            return [_value(item) for item in items]
        case ast.Set([ast.Constant(value=inside)]) if inside is ...:  # {...}
            return ...
        case _:
            return ast.literal_eval(node)


def is_open(value: Any) -> bool:
    """Whether it is the agent's to say."""
    if isinstance(value, list) and len(value) == 1:
        return is_open(value[0])
    return any(value is one or value == one for one in _LEFT_OPEN)


def dicts(value: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings within a value."""
    if isinstance(value, Mapping):
        yield value
    inside = value.values() if isinstance(value, Mapping) else value
    if isinstance(inside, str) or not hasattr(inside, "__iter__"):
        return
    for one in inside:
        yield from dicts(one)


@dataclass
class Follower:
    """An agent that makes a prompt's calls, one after another.

    Attributes:
        says: What it gives for `...`, by the argument's name; replies add to it.
        instead: Arguments that a tool gets in any case, to make a task small.
        only_plans: Has a run checked and priced, not started.
    """

    agent: Agent
    says: dict[str, Any]
    instead: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    only_plans: bool = False
    made: list[str] = field(default_factory=list)

    async def follow(self, text: str, *without: str) -> dict[str, dict[str, Any]]:
        """Make all calls, but those of some tools; the last reply of each tool."""
        replies: dict[str, dict[str, Any]] = {}
        for call in calls(text):
            if not call.is_mention and call.tool not in without:
                replies[call.tool] = await self._make(call)
        return replies

    async def _make(self, call: Call) -> dict[str, Any]:
        arguments = {name: self._said(name, value) for name, value in call.arguments.items()}
        arguments |= self.instead.get(call.tool, {})
        tool = call.tool
        if tool == "start_run" and self.only_plans:
            tool, arguments = "estimate_cost", {"spec": arguments}
        while True:
            reply = await self.agent.call(tool, **arguments)
            if reply.get("finished", True):
                break
        self.made.append(tool)
        for name in ("run_id", "group_id"):
            if reply.get(name):
                self.says[name] = reply[name]
        return reply

    def _said(self, name: str, value: Any) -> Any:
        if is_open(value):
            return self.says[name]
        if isinstance(value, Mapping):
            return {key: self._said(key, one) for key, one in value.items()}
        return value
