"""JSON schemas as short as a host's context deserves: the same values, fewer words.

pydantic repeats each name as a title, says "or null" with an anyOf, and puts models used once
into $defs. What validates a call or a reply is the pydantic model itself; these are its advert:
whatever it refuses is refused, and what goes without saying it leaves to the model's error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Schema = dict[str, Any]

_NULL = {"type": "null"}
_BY_NAME = ("properties", "$defs")  # mappings from free names to schemas
# pydantic leaves a bound behind a BeforeValidator under its own name, which no client knows.
_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
# A rank of -3 or an empty path comes from nobody; each such bound costs five tokens in every chat.
_UNSAID = {"minimum": (0, 1), "exclusiveMinimum": (0,), "minLength": (1,), "minItems": (1,)}
_FAR = 1e6  # a bound from here on is never met either
_BRIEF = "brief"  # of an object: the fields to tell of; those left out another tool tells


def short_input(schema: Schema) -> Schema:
    """What hosts are told of a tool's arguments: without the bounds that nobody would cross."""
    return _mapped(_inlined(_mapped(schema, _short)), _told)


def briefly(*fields: str) -> Schema:
    """For a `Field` that takes an object: tell only of these fields of it, and take all."""
    return {_BRIEF: list(fields)}


def complete_input(schema: Schema) -> Schema:
    """An input schema without titles, docstrings of models, and the null that omission means."""
    return _mapped(_inlined(_mapped(schema, _short)), _without_brief)


def short_output(names: Iterable[str]) -> Schema:
    """A reply by the names of its fields, all of which it always has.

    The names say what they are, and a reply what is in them; types were a quarter of the list.
    """
    return {"type": "object", "required": list(names)}


def _mapped(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """The schema and all schemas in it, each changed."""
    changed = change(schema)
    for key, value in changed.items():
        if key in _BY_NAME:
            changed[key] = {name: _mapped(inner, change) for name, inner in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            changed[key] = _mapped(value, change)
        elif key in ("anyOf", "oneOf", "prefixItems"):
            changed[key] = [_mapped(inner, change) for inner in value]
    return changed


def _short(schema: Schema) -> Schema:
    whole = _without_default_null({key: v for key, v in schema.items() if key != "title"})
    short = {_BOUNDS.get(key, key): _whole(value) for key, value in whole.items()}
    if "properties" in short:
        short.pop("description", None)  # a model's docstring, for readers of the code
    return short


def _without_brief(schema: Schema) -> Schema:
    return {key: value for key, value in schema.items() if key != _BRIEF}


def _told(schema: Schema) -> Schema:
    told = {key: value for key, value in schema.items() if not _is_unsaid(key, value)}
    if fields := told.pop(_BRIEF, None):
        del told["additionalProperties"]
        told["properties"] = {name: told["properties"][name] for name in fields}
    return told


def _is_unsaid(key: str, value: Any) -> bool:
    is_far = key in _BOUNDS.values() and abs(value) >= _FAR
    is_alphabet = key == "pattern" and value.startswith("^[")
    is_default = key == "additionalProperties" and value is True
    return is_far or is_alphabet or is_default or value in _UNSAID.get(key, ())


def _whole(value: Any) -> Any:
    """0 for 0.0, which is a token or two shorter and the same number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_default_null(schema: Schema) -> Schema:
    """An argument that may be left out needs no null as well; a call that sends one still works."""
    others = [inner for inner in schema.get("anyOf", []) if inner != _NULL]
    if "default" not in schema or schema["default"] is not None:
        return schema
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    if not others:
        return rest
    return {**others[0], **rest} if len(others) == 1 else {**rest, "anyOf": others}


def _inlined(schema: Schema) -> Schema:
    """Definitions that are used once stand where they are used."""
    definitions = schema.get("$defs", {})
    uses = Counter(_references(schema))
    once = {name for name in definitions if uses[name] == 1}
    kept = {name: _placed(d, definitions, once) for name, d in definitions.items()}
    whole = {key: value for key, value in schema.items() if key != "$defs"}
    left = {name: definition for name, definition in kept.items() if name not in once}
    placed: Schema = _placed(whole, definitions, once)
    return {**placed, "$defs": left} if left else placed


def _placed(node: Any, definitions: Schema, once: set[str]) -> Any:
    if isinstance(node, list):
        return [_placed(inner, definitions, once) for inner in node]
    if not isinstance(node, dict):
        return node
    name = _name(node)
    if name in once:
        rest = {key: value for key, value in node.items() if key != "$ref"}
        inner = {**definitions[name], **rest}
        return _placed(inner, definitions, once - {name})
    return {key: _placed(value, definitions, once) for key, value in node.items()}


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if name := _name(node):
            yield name
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from _references(inner)


def _name(node: Schema) -> str:
    reference = node.get("$ref")  # a field may be called so, too; then it is a schema
    return reference.removeprefix("#/$defs/") if isinstance(reference, str) else ""
