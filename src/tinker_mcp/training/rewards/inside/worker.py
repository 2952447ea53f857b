"""Scoring inside the walls, with a user's file or one of the built-in graders."""

from __future__ import annotations

import functools
import inspect
import linecache
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from tinker_mcp.training.rewards.inside import frames
from tinker_mcp.training.rewards.inside.errors import UnusableError

if TYPE_CHECKING:
    import asyncio

Batch: TypeAlias = Callable[[Sequence[str], Sequence[Any]], Sequence[Any]]
Result: TypeAlias = "float | int | dict[str, str]"
"""A number, or {"error": sentence}."""

MAX_ERROR_CHARACTERS = 300
_MAX_DIGITS = 300


def serve(program: dict[str, Any], requests: int, answers: int) -> None:
    """Load the program, say so, then answer each request: {"id", "completions", "rows"}."""
    try:
        score, is_batch = loaded(program)
    except BaseException as error:
        why = str(error) if isinstance(error, UnusableError) else told(error, program["name"])
        frames.send(answers, {"error": why})
        return
    frames.send(answers, {"is_batch": is_batch})
    while True:
        try:
            request = frames.receive(requests)
        except EOFError:
            return
        results = _results(score, request, program["name"])
        frames.send(answers, {"id": request["id"], "results": results})


def loaded(program: dict[str, Any]) -> tuple[Batch, bool]:
    """The program as a function of a batch, and whether it wants whole batches.

    Raises:
        UnusableError: It has no function to score with.
    """
    if program["kind"] == "grader":
        from tinker_mcp.training.rewards.inside.graders import grader

        return _each(grader(program["name"], program["arguments"])), False
    source, name = program["source"], program["name"]
    if program["folder"]:
        sys.path.append(program["folder"])
    # So that a traceback, which cannot read the file, still shows its lines.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    module = type(sys)("reward_file")
    module.__file__ = name
    sys.modules["reward_file"] = module  # dataclasses look there
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102  # what the jail is for
    for function, is_batch in (("reward_batch", True), ("reward", False)):
        found = getattr(module, function, None)
        if callable(found):
            return (_whole(found) if is_batch else _each(found)), is_batch
    raise UnusableError(
        "it defines neither reward(completion, row) nor reward_batch(completions, rows)"
    )


def told(error: BaseException, name: str) -> str:
    """What was raised, and in which line of the file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == name]  # fmt: skip
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    place = f" (line {line})" if line else ""
    said = error.msg if isinstance(error, SyntaxError) else _text(error)
    sentence = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return f"it raised {sentence[:MAX_ERROR_CHARACTERS]}{place}"


def result(value: Any) -> Result:
    """A value as it may leave: a number, of numpy and torch too, or an error."""
    if not isinstance(value, (int, float)) and callable(getattr(value, "item", None)):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = repr(value[:60]) if isinstance(value, str) else ""
        return {"error": f"it returned {type(value).__name__} {shown}".rstrip() + ", not a number"}
    if isinstance(value, int):
        is_small = abs(value) < 10**_MAX_DIGITS
        return int(value) if is_small else {"error": "it returned a number too large for a float"}
    number = float(value)
    if not math.isfinite(number):
        return {"error": f"it returned {number}"}
    return number


def _results(score: Batch, request: dict[str, Any], name: str) -> list[Result]:
    completions, rows = request["completions"], request["rows"]
    try:
        values = list(score(completions, rows))
        if len(values) != len(completions):
            raise UnusableError(f"it returned {len(values)} values for {len(completions)} samples")
    except BaseException as error:
        why = str(error) if isinstance(error, UnusableError) else told(error, name)
        return [{"error": why}] * len(completions)
    return [_result(value, name) for value in values]


def _result(value: Any, name: str) -> Result:
    try:
        return result(value)
    except BaseException as error:  # its item() or comparison is foreign code too
        return {"error": told(error, name)}


def _each(function: Callable[[str, Any], Any]) -> Batch:
    def score(completions: Sequence[str], rows: Sequence[Any]) -> list[Any]:
        return [
            _awaited(function(completion, row))
            for completion, row in zip(completions, rows, strict=True)
        ]

    return score


def _whole(function: Callable[[Sequence[str], Sequence[Any]], Any]) -> Batch:
    def score(completions: Sequence[str], rows: Sequence[Any]) -> Sequence[Any]:
        values: Sequence[Any] = _awaited(function(completions, rows))
        return values

    return score


def _awaited(value: Any) -> Any:
    return _loop().run(_finished(value)) if inspect.isawaitable(value) else value


@functools.cache
def _loop() -> asyncio.Runner:
    import asyncio

    return asyncio.Runner()


async def _finished(value: Any) -> Any:
    return await value


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return ""
