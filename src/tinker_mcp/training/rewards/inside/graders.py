"""Built-in rewards whose work a completion could make endless: patterns, schemas, algebra."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from tinker_mcp.training.rewards.inside.errors import UnusableError

Grader: TypeAlias = Callable[[str, Mapping[str, Any]], float]

_FENCED = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)


def grader(name: str, arguments: Mapping[str, Any]) -> Grader:
    """The grader of a name.

    Raises:
        UnusableError: Its arguments or this installation do not allow it.
    """
    return _GRADERS[name](arguments)


def expected(row: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """What is expected: an argument, or a column of the row.

    Raises:
        UnusableError: The row lacks it.
    """
    if arguments.get("expected") is not None:
        return arguments["expected"]
    column = arguments["column"]
    if not isinstance(row, Mapping) or row.get(column) is None:
        raise UnusableError(f"the row has no {column!r}")
    return row[column]


def _regex(arguments: Mapping[str, Any]) -> Grader:
    try:
        pattern = re.compile(arguments["pattern"], re.DOTALL)
    except re.error as error:
        raise UnusableError(f"its pattern is no regular expression: {error}") from error
    if arguments.get("column") is None:
        return lambda completion, row: float(pattern.search(completion) is not None)
    if pattern.groups == 0:
        raise UnusableError("its pattern has no group to compare with the column")

    def captured(completion: str, row: Mapping[str, Any]) -> float:
        found = pattern.search(completion)
        wanted = str(expected(row, arguments)).strip()
        return float(found is not None and (found[1] or "").strip() == wanted)

    return captured


def _json_schema(arguments: Mapping[str, Any]) -> Grader:
    import jsonschema

    def check(schema: Any) -> Any:
        try:
            kind = jsonschema.validators.validator_for(schema)
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise UnusableError(f"its schema is none: {error.message[:200]}") from error
        return kind(schema)

    known = functools.cache(lambda text: check(json.loads(text)))
    if arguments.get("expected") is not None:
        check(arguments["expected"])

    def valid(completion: str, row: Mapping[str, Any]) -> float:
        schema = expected(row, arguments)
        validator = known(schema if isinstance(schema, str) else json.dumps(schema))
        try:
            value = json.loads(_block(completion))
        except (ValueError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))

    return valid


def _math(arguments: Mapping[str, Any]) -> Grader:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UnusableError(
            "math-verify is not installed; run: pip install 'tinker-mcp[math]'"
        ) from error

    # Its own limits would make a timeout a 0; the jail's makes it an error.
    @functools.lru_cache(maxsize=1024)
    def gold(text: str) -> Any:
        parsed = parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
        if not parsed:
            raise UnusableError(f"the expected answer {text[:60]!r} is no mathematics")
        return parsed

    def equal(completion: str, row: Mapping[str, Any]) -> float:
        wanted = gold(str(expected(row, arguments)))
        said = parse(completion, parsing_timeout=None)
        return float(bool(verify(wanted, said, timeout_seconds=None)))

    return equal


def _block(completion: str) -> str:
    """The last fenced block, or all of it where there is none."""
    blocks = _FENCED.findall(completion)
    return str(blocks[-1]) if blocks else completion


_GRADERS: Mapping[str, Callable[[Mapping[str, Any]], Grader]] = {
    "regex": _regex,
    "json_schema": _json_schema,
    "math": _math,
}
