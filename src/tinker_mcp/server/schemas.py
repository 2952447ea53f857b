"""JSON schemas as short as a host's context deserves: the same values, fewer words.

pydantic repeats each name as a title, says "or null" with an anyOf, and puts models used once
into $defs. What validates a call or a reply is the pydantic model itself; these are its advert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_NULL = {"type": "null"}
_EVERY_TYPE = ("string", "number", "boolean", "object", "array", "null")
_BY_NAME = ("properties", "$defs")  # mappings from free names to schemas
# pydantic leaves a bound behind a BeforeValidator under its own name, which no client knows.
_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


def short_input(schema: Schema) -> Schema:
    """An input schema without titles, docstrings of models, and the null that omission means."""
    return _inlined(_short(schema))


def short_output(schema: Schema) -> Schema:
    """The fields of a reply with their types; what is inside of one shows when it comes."""
    fields = {
        name: {"type": types[0] if len(types) == 1 else types} for name, types in _fields(schema)
    }
    return {"type": "object", "properties": fields}


def _fields(schema: Schema) -> Iterator[tuple[str, list[str]]]:
    for name, field in schema.get("properties", {}).items():
        yield name, _types(field, schema.get("$defs", {}))


def _types(field: Schema, definitions: Schema) -> list[str]:
    """What a field may be, as JSON names it; each once."""
    if name := _name(field):
        return _types(definitions[name], definitions)
    if "anyOf" in field:
        found = [kind for inner in field["anyOf"] for kind in _types(inner, definitions)]
        return list(dict.fromkeys(found))
    return [field["type"]] if "type" in field else list(_EVERY_TYPE)


def _short(schema: Schema) -> Schema:
    whole = _without_default_null({key: v for key, v in schema.items() if key != "title"})
    short = {_BOUNDS.get(key, key): value for key, value in whole.items()}
    if "properties" in short:
        short.pop("description", None)  # a model's docstring, for readers of the code
    for key, value in short.items():
        if key in _BY_NAME:
            short[key] = {name: _short(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            short[key] = _short(value)
        elif key in ("anyOf", "oneOf", "prefixItems"):
            short[key] = [_short(inner) for inner in value]
    return short


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
