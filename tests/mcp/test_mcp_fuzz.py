"""Each tool's schema against the tool: what it allows works, and nothing else is taken.

An argument that may be left out may also be null, and an object or a list may come as JSON text;
neither is advertised, hosts do both. Nor are bounds that nobody would cross; what a tool accepts
is compared with the schema that has them.
"""

from __future__ import annotations

import json
import string
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import pytest
from agents import TINY, Agent, in_memory
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tinker_mcp.server.app import TOOLS
from tinker_mcp.server.boundary import MAX_ERROR_CHARACTERS, StrictTool
from tinker_mcp.server.schemas import complete_input
from tinker_mcp.settings import Settings

# Hypothesis takes it for ours when a thread of the SDK draws a number meanwhile.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

Schema = dict[str, Any]

EXAMPLES = 60  # of arguments, a tool
CALLS = 25  # of a running tool
BIG = 2**70
NAMES = [spec.fn.__name__ for spec in TOOLS]
WITH_ARGUMENTS = [
    name for name in NAMES if name not in ("check_setup", "list_models", "list_clients")
]


def fuzz(examples: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


TEXTS = st.text(max_size=12) | st.sampled_from(["null", "true", "1", "[1, 2]", '{"a": 1}', "NaN"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-BIG, BIG)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def valid(schema: Schema) -> st.SearchStrategy[Any]:
    """Values of a schema as our tools advertise them."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([valid(inner) for inner in schema["anyOf"]])
    return _OF_TYPE[schema["type"]](schema) if "type" in schema else ANYTHING


def _text(schema: Schema) -> st.SearchStrategy[str]:
    if "pattern" in schema:
        printable = st.sampled_from(string.printable[:95])
        return st.from_regex(schema["pattern"], fullmatch=True, alphabet=printable)
    longest = min(schema.get("maxLength", 12), 12)
    texts = st.text(min_size=schema.get("minLength", 0), max_size=longest)
    return texts | TEXTS.filter(lambda text: len(text) >= schema.get("minLength", 0))


def _integer(schema: Schema) -> st.SearchStrategy[int]:
    highest = schema.get("maximum", schema.get("exclusiveMaximum", BIG + 1) - 1)
    return st.integers(schema.get("minimum", -BIG), highest)


def _number(schema: Schema) -> st.SearchStrategy[float]:
    lowest, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    highest, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    return st.floats(
        lowest if above is None else above,
        highest if below is None else below,
        exclude_min=above is not None,
        exclude_max=below is not None,
        allow_nan=False,
        allow_infinity=False,
    )


def _list(schema: Schema) -> st.SearchStrategy[list[Any]]:
    return st.lists(valid(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)


def _object(schema: Schema) -> st.SearchStrategy[dict[str, Any]]:
    properties, required = schema.get("properties"), schema.get("required", [])
    if properties is None:
        others = schema.get("additionalProperties", True)
        values = valid(others) if isinstance(others, dict) else ANYTHING
        return st.dictionaries(st.text(max_size=6), values, max_size=3)
    fields = {name: valid(inner) for name, inner in properties.items()}
    return st.fixed_dictionaries(
        {name: fields[name] for name in required},
        optional={name: fields[name] for name in fields if name not in required},
    )


_OF_TYPE = {
    "string": _text,
    "integer": _integer,
    "number": _number,
    "boolean": lambda _: st.booleans(),
    "array": _list,
    "object": _object,
}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StrictTool]:
    replies = tmp_path_factory.mktemp("replies")
    return {spec.fn.__name__: StrictTool.of(spec, replies) for spec in TOOLS}


@pytest.fixture(scope="module")
def complete(tools: dict[str, StrictTool]) -> dict[str, Schema]:
    """What each tool takes, with the bounds that hosts are not told of."""
    return {
        name: complete_input(tool.fn_metadata.arg_model.model_json_schema(by_alias=True))
        for name, tool in tools.items()
    }


# What clients know of JSON Schema, and our tools use.
KEYWORDS = {
    *("type", "properties", "required", "additionalProperties", "items", "minItems", "enum"),
    *("anyOf", "default", "description", "pattern", "minLength", "maxLength"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


def keywords(schema: Schema) -> set[str]:
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", [])]
    inner += [schema[key] for key in ("items", "additionalProperties") if schema.get(key)]
    return set(schema).union(*(keywords(one) for one in inner if isinstance(one, dict)))


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_says_all_in_words_that_clients_know(
    name: str, tools: dict[str, StrictTool]
) -> None:
    assert keywords(tools[name].parameters) <= KEYWORDS


def accepts(tool: StrictTool, arguments: dict[str, Any]) -> bool:
    try:
        tool._validated(arguments)
    except ValidationError:
        return False
    return True


def is_valid(schema: Schema, arguments: dict[str, Any]) -> bool:
    """Null stands for left out, and JSON text for an object or a list."""
    properties = schema["properties"]
    read = {}
    for name, sent in arguments.items():
        takes = properties.get(name, {}).get("type")
        is_text = takes in ("object", "array") and isinstance(sent, str)
        value = _read(sent) if is_text else sent
        if value is not None or "default" in properties.get(name, {}):
            read[name] = value
    return jsonschema.Draft202012Validator(schema).is_valid(read)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("name", NAMES)
def test_what_the_schema_allows_is_accepted(
    name: str, tools: dict[str, StrictTool], complete: dict[str, Schema]
) -> None:
    @fuzz(EXAMPLES)
    @given(valid(complete[name]))
    def check(arguments: dict[str, Any]) -> None:
        tools[name]._validated(arguments)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_what_hosts_are_told_allows_all_that_is_accepted(
    name: str, tools: dict[str, StrictTool], complete: dict[str, Schema]
) -> None:
    told = jsonschema.Draft202012Validator(tools[name].parameters)

    @fuzz(EXAMPLES)
    @given(valid(complete[name]))
    def check(arguments: dict[str, Any]) -> None:
        told.validate(arguments)

    check()


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_a_value_of_another_kind_is_refused(
    name: str, tools: dict[str, StrictTool], complete: dict[str, Schema]
) -> None:
    tool, schema = tools[name], complete[name]

    @fuzz(EXAMPLES)
    @given(valid(schema), st.sampled_from(sorted(schema["properties"])), ANYTHING)
    def check(arguments: dict[str, Any], argument: str, value: Any) -> None:
        changed = {**arguments, argument: value}
        assert accepts(tool, changed) == is_valid(schema, changed)

    check()


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 1}', "null", "true", "3"])
def test_text_that_looks_like_json_stays_text(text: str, tools: dict[str, StrictTool]) -> None:
    assert tools["sample"]._validated({"prompt": text})["prompt"] == text


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_what_json_cannot_say_is_refused(number: float, tools: dict[str, StrictTool]) -> None:
    assert not accepts(tools["optim_step"], {"client_id": "c", "learning_rate": number})


def test_an_object_may_come_as_json_text(tools: dict[str, StrictTool]) -> None:
    sent = {"client_id": "client-1", "data_id": "data-1", "loss_fn_config": '{"beta": 0.5}'}
    assert tools["forward_backward"]._validated(sent)["loss_fn_config"] == {"beta": 0.5}


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_that_does_not_exist_is_refused(
    name: str, tools: dict[str, StrictTool], complete: dict[str, Schema]
) -> None:
    tool = tools[name]
    unknown = st.text(max_size=8).filter(lambda text: text not in tool.parameters["properties"])

    @fuzz(EXAMPLES)
    @given(valid(complete[name]), unknown, ANYTHING)
    def check(arguments: dict[str, Any], argument: str, value: Any) -> None:
        assert not accepts(tool, {**arguments, argument: value})

    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_required_argument_cannot_be_left_out(
    name: str, tools: dict[str, StrictTool], complete: dict[str, Schema]
) -> None:
    tool = tools[name]

    @fuzz(EXAMPLES)
    @given(valid(complete[name]))
    def check(arguments: dict[str, Any]) -> None:
        for argument in tool.parameters.get("required", []):
            rest = {key: value for key, value in arguments.items() if key != argument}
            assert not accepts(tool, rest)

    check()


def likely(known: dict[str, str], folder: Path) -> dict[str, st.SearchStrategy[Any]]:
    """Values that reach further than random ones, and keep a call short."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    return {
        "base_model": st.sampled_from([TINY, TINY, "no/model"]),
        "checkpoint": st.sampled_from(
            [known["state"], known["sampler"], "tinker://none/weights/x"]
        ),
        "client_id": st.sampled_from([known["client_id"], known["client_id"], "client-99"]),
        "data_id": st.sampled_from([known["data_id"], known["data_id"], "data-99"]),
        "path": st.sampled_from([str(folder / "rows.jsonl"), str(folder), "/etc/passwd", "none"]),
        "output_dir": st.sampled_from([str(folder / "out"), str(folder / "rows.jsonl"), "/none"]),
        "renderer": st.sampled_from(["role_colon", "llama3", ""]),
        "conversations": st.lists(st.just(row) | ANYTHING, max_size=3),
        "messages": st.lists(
            st.just(row["messages"][0]) | st.just({"a": 1}), min_size=1, max_size=2
        ),
        "rank": st.integers(1, 8),
        "steps": st.integers(1, 2),
        "batch_size": st.sampled_from([1, 2, 10**6]),
        "num_samples": st.integers(1, 2),
        "max_tokens": st.integers(1, 4),
    }


# A call needs exactly one of each that its tool has; schemas cannot say so shortly.
ALTERNATIVES = (
    ("client_id", "checkpoint", "base_model"),
    ("path", "conversations", "groups"),
    ("messages", "prompt", "text"),
)


def _choose(draw: st.DrawFn, schema: Schema, arguments: dict[str, Any]) -> None:
    properties = schema["properties"]
    for names in ALTERNATIVES:
        if there := [name for name in names if name in properties]:
            chosen = draw(st.sampled_from(there))
            for name in set(there) - {chosen, *schema.get("required", [])}:
                arguments.pop(name, None)
            arguments[chosen] = draw(valid(properties[chosen]))


@st.composite
def calls(
    draw: st.DrawFn, schema: Schema, values: dict[str, st.SearchStrategy[Any]]
) -> dict[str, Any]:
    arguments = draw(valid(schema))
    if draw(st.sampled_from([True, True, False])):
        _choose(draw, schema, arguments)
    for name in sorted(arguments.keys() & values.keys()):
        # Any text will do; the numbers in `values` are bounds on what a call costs.
        if not (isinstance(arguments[name], str) and draw(st.sampled_from([True, False, False]))):
            arguments[name] = draw(values[name])
    return arguments


@pytest.mark.timeout(180)
def test_no_valid_call_makes_a_tool_crash(
    settings: Settings, tmp_path: Path, complete: dict[str, Schema]
) -> None:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(in_memory(settings)) as agent,
    ):
        values = likely(portal.call(_something_to_work_on, agent), tmp_path)

        def check(name: str, arguments: dict[str, Any]) -> None:
            reply = portal.call(partial(agent.client.call_tool, name, arguments))
            text = getattr(reply.content[0], "text", "")
            assert "internal:" not in text
            assert not reply.is_error or len(text) <= MAX_ERROR_CHARACTERS

        # Last, since it closes what the others need.
        for name in sorted(NAMES, key=lambda name: name == "close_client"):
            arguments = calls(complete[name], values)
            called = given(st.just(name), arguments)(check)
            fuzz(CALLS)(called)()


async def _something_to_work_on(agent: Agent) -> dict[str, str]:
    client_id = await agent.new_client()
    data_id = (await agent.new_data())["data_id"]
    saved = await agent.call("save_checkpoint", client_id=client_id, name="fuzz")
    paths = {"state": saved["state"], "sampler": saved["sampler"]}
    return {"client_id": client_id, "data_id": data_id, **paths}
