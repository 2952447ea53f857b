"""What tools/list costs, and that short schemas still say what is validated."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

import jsonschema
from mcp.client import Client
from pydantic import BaseModel, Field

from tinker_mcp.server import create_server
from tinker_mcp.server.schemas import short_input, short_output
from tinker_mcp.settings import Settings

CHARACTERS_A_TOKEN = 4
MAX_TOKENS, MAX_VISIBLE_TOKENS = 7_000, 5_000


class Inner(BaseModel):
    """A docstring for readers of the code."""

    title: str = Field("a title", description="Its title.")
    size: int | None = None


class Kind(Enum):
    A = "a"
    B = "b"


class Outer(BaseModel):
    one: Inner | None = Field(None, description="The only use.")
    number: int | float | None = None
    text: str | None
    kind: Kind = Kind.A
    names: list[str] = []
    anything: Any = None


async def listed() -> list[dict[str, Any]]:
    async with Client(create_server(Settings())) as client:
        tools = (await client.list_tools()).tools
    return [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]


def tokens(value: Any) -> int:
    return len(json.dumps(value)) // CHARACTERS_A_TOKEN


async def test_the_list_of_tools_is_cheap() -> None:
    tools = await listed()
    seen = [{key: tool[key] for key in ("name", "description", "inputSchema")} for tool in tools]
    assert tokens(tools) < MAX_TOKENS
    assert tokens(seen) < MAX_VISIBLE_TOKENS


async def test_every_schema_is_one() -> None:
    for tool in await listed():
        for key in ("inputSchema", "outputSchema"):
            jsonschema.Draft202012Validator.check_schema(tool[key])
            assert tool[key]["type"] == "object"


def test_titles_and_docstrings_go_and_a_field_called_title_stays() -> None:
    short = short_input(Outer.model_json_schema())
    assert "readers of the code" not in json.dumps(short)
    assert short["properties"]["one"]["properties"]["title"] == {
        "default": "a title",
        "description": "Its title.",
        "type": "string",
    }


def test_what_is_used_once_stands_where_it_is_used() -> None:
    short = short_input(Outer.model_json_schema())
    assert "$defs" not in short
    assert short["properties"]["one"]["description"] == "The only use."
    assert short["properties"]["one"]["type"] == "object"


def test_an_argument_that_may_be_left_out_needs_no_null() -> None:
    properties = short_input(Outer.model_json_schema())["properties"]
    assert properties["number"]["anyOf"] == [{"type": "integer"}, {"type": "number"}]
    assert properties["text"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    assert properties["anything"] == {}


def test_a_reply_shows_its_fields_and_their_types() -> None:
    short = short_output(Outer.model_json_schema(mode="serialization"))
    assert short == {
        "type": "object",
        "properties": {
            "one": {"type": ["object", "null"]},
            "number": {"type": ["integer", "number", "null"]},
            "text": {"type": ["string", "null"]},
            "kind": {"type": "string"},
            "names": {"type": "array"},
            "anything": {"type": ["string", "number", "boolean", "object", "array", "null"]},
        },
    }
    jsonschema.validate(json.loads(Outer(text=None).model_dump_json()), short)
