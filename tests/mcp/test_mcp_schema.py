"""What tools/list costs, and that short schemas still say what is validated."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any

import jsonschema
import pytest
from mcp.client import Client
from pydantic import BaseModel, ConfigDict, Field

from tinker_mcp.server import create_server
from tinker_mcp.server.schemas import briefly, complete_input, short_input, short_output
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


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")

    first: int = Field(ge=1)
    second: int = 2


class Bounded(BaseModel):
    rank: Annotated[int, Field(ge=1, le=512)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    name: Annotated[str, Field(min_length=1, pattern="^[a-z]+$")]
    path: Annotated[str, Field(pattern="^tinker://")]
    brief: Annotated[Fields, Field(json_schema_extra=briefly("first"))]


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


def test_a_bound_that_nobody_would_cross_is_not_told() -> None:
    told = short_input(Bounded.model_json_schema())["properties"]
    assert told["rank"] == {"type": "integer", "maximum": 512}
    assert told["seed"] == {"type": "integer"}
    assert told["share"] == {"type": "number", "exclusiveMaximum": 1, "default": 0}
    assert told["name"] == {"type": "string"}
    assert told["path"] == {"type": "string", "pattern": "^tinker://"}


def test_an_object_that_another_tool_tells_of_is_told_briefly_and_taken_whole() -> None:
    told = short_input(Bounded.model_json_schema())["properties"]["brief"]
    assert told == {
        "type": "object",
        "properties": {"first": {"type": "integer"}},
        "required": ["first"],
    }
    whole = complete_input(Bounded.model_json_schema())["properties"]["brief"]
    assert set(whole["properties"]) == {"first", "second"}
    assert "brief" not in whole


@pytest.mark.parametrize(
    ("argument", "value"),
    [("rank", 0), ("seed", 2**63), ("rank", 513)],
)
async def test_a_bound_holds_whether_it_is_told_or_not(argument: str, value: int) -> None:
    async with Client(create_server(Settings())) as client:
        reply = await client.call_tool("create_training_client", {argument: value})
    assert reply.is_error
    assert f"{argument}={value}: Input should be " in getattr(reply.content[0], "text", "")


def test_a_reply_shows_the_names_of_its_fields() -> None:
    short = short_output(Outer.model_fields)
    names = ("one", "number", "text", "kind", "names", "anything")
    assert short == {"type": "object", "required": list(names)}
    reply = json.loads(Outer(text=None).model_dump_json())
    jsonschema.validate(reply, short)
    del reply["kind"]
    assert not jsonschema.Draft202012Validator(short).is_valid(reply)
