"""What the conformance suite expects of a server under test, mounted beside our own surface.

The names, messages and schemas are the suite's (`conformance list`, each scenario's description).
Nothing here is part of the server: it shows that our server object speaks all of the protocol.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import mcp_types as types
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.prompts.base import Prompt, UserMessage
from mcp.server.mcpserver.tools import Tool
from mcp.shared.exceptions import MCPError

Answer = str | types.InputRequiredResult

# One transparent pixel, and a WAV file without samples.
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "YPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
WAV = base64.b64encode(
    b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0data\0\0\0\0"
).decode()

DEFAULTS = {
    "name": {"type": "string", "default": "John Doe"},
    "age": {"type": "integer", "default": 30},
    "score": {"type": "number", "default": 95.5},
    "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
    "verified": {"type": "boolean", "default": True},
}
_OPTIONS = ["option1", "option2", "option3"]
_TITLED = [{"const": f"value{n}", "title": f"Option {n}"} for n in (1, 2, 3)]
ENUMS = {
    "untitledSingle": {"type": "string", "enum": _OPTIONS},
    "titledSingle": {"type": "string", "oneOf": _TITLED},
    "legacyEnum": {"type": "string", "enum": _OPTIONS, "enumNames": ["One", "Two", "Three"]},
    "untitledMulti": {"type": "array", "items": {"type": "string", "enum": _OPTIONS}},
    "titledMulti": {"type": "array", "items": {"anyOf": _TITLED}},
}
SCHEMA_2020_12 = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}


def mount(server: MCPServer[Any]) -> None:
    """Add the suite's tools, prompts, resources and handlers to `server`."""
    for tool in [*CONTENT, *CONVERSATIONS, *INPUT_REQUIRED]:
        server.add_tool(tool)
    for change in _list_changes(server):
        server.add_tool(change)
    _add_tool_with_schema(server, json_schema_2020_12_tool, SCHEMA_2020_12)
    for prompt in PROMPTS:
        server.add_prompt(Prompt.from_function(prompt))
    _mount_resources(server)
    _mount_handlers(server)


# Content


def test_simple_text() -> str:
    """Text."""
    return "This is a simple text response for testing."


def test_image_content() -> list[types.ImageContent]:
    """An image."""
    return [_image()]


def test_audio_content() -> list[types.AudioContent]:
    """A sound."""
    return [types.AudioContent(type="audio", data=WAV, mime_type="audio/wav")]


def test_embedded_resource() -> list[types.EmbeddedResource]:
    """A resource inside of a reply."""
    text = "This is an embedded resource content."
    return [_embedded("test://embedded-resource", "text/plain", text)]


def test_multiple_content_types() -> list[
    types.TextContent | types.ImageContent | types.EmbeddedResource
]:
    """Text, an image and a resource."""
    return [
        types.TextContent(type="text", text="Multiple content types test:"),
        _image(),
        _embedded(
            "test://mixed-content-resource", "application/json", '{"test":"data","value":123}'
        ),
    ]


def test_error_handling() -> str:
    """An error."""
    raise ToolError("This tool intentionally returns an error for testing")


def json_schema_2020_12_tool() -> str:
    """Has a schema of its own."""
    return "ok"


def _image() -> types.ImageContent:
    return types.ImageContent(type="image", data=PNG, mime_type="image/png")


def _embedded(uri: str, mime_type: str, text: str) -> types.EmbeddedResource:
    inside = types.TextResourceContents(uri=uri, mime_type=mime_type, text=text)
    return types.EmbeddedResource(type="resource", resource=inside)


CONTENT: list[Callable[..., Any]] = [
    test_simple_text,
    test_image_content,
    test_audio_content,
    test_embedded_resource,
    test_multiple_content_types,
    test_error_handling,
]


# Calls during which the server speaks to its client


async def test_tool_with_logging(ctx: Context) -> str:
    """Logs three times."""
    for text in ("Tool execution started", "Tool processing data", "Tool execution completed"):
        await ctx.log("info", text)
        await anyio.sleep(0.05)  # the suite wants them spread
    return "Tool with logging executed successfully"


async def test_tool_with_progress(ctx: Context) -> str:
    """Reports progress three times."""
    for done in (0, 50, 100):
        await ctx.report_progress(done, 100, f"Completed step {done} of 100")
        await anyio.sleep(0.05)
    return "Progress reported"


async def test_sampling(prompt: str, ctx: Context) -> str:
    """Asks the client's model."""
    # On the stream of this call: the client may not have opened the session's own yet, and what is
    # sent there before is lost.
    said = await ctx.session.create_message(
        [_user(prompt)], max_tokens=100, related_request_id=ctx.request_id
    )
    text = said.content.text if isinstance(said.content, types.TextContent) else "?"
    return f"LLM response: {text}"


async def test_elicitation(message: str, ctx: Context) -> str:
    """Asks the client's user."""
    fields = {"username": {"type": "string"}, "email": {"type": "string"}}
    return f"User response: {await _elicited(ctx, message, fields)}"


async def test_elicitation_sep1034_defaults(ctx: Context) -> str:
    """Asks with default values."""
    return f"Elicitation completed: {await _elicited(ctx, 'Please review', DEFAULTS)}"


async def test_elicitation_sep1330_enums(ctx: Context) -> str:
    """Asks for choices."""
    return f"Elicitation completed: {await _elicited(ctx, 'Please choose', ENUMS)}"


async def test_missing_capability(ctx: Context) -> str:
    """Needs a client that samples."""
    capabilities = ctx.client_capabilities
    if capabilities is None or capabilities.sampling is None:
        raise MCPError(
            code=types.MISSING_REQUIRED_CLIENT_CAPABILITY,
            message="This tool needs the client's sampling capability.",
            data={"requiredCapabilities": {"sampling": {}}},
        )
    return "The client samples."


async def _elicited(ctx: Context, message: str, fields: dict[str, Any]) -> str:
    schema = {"type": "object", "properties": fields}
    answer = await ctx.session.elicit_form(message, schema, ctx.request_id)
    return f"action={answer.action}, content={json.dumps(answer.content or {})}"


CONVERSATIONS: list[Callable[..., Awaitable[Any]]] = [
    test_tool_with_logging,
    test_tool_with_progress,
    test_sampling,
    test_elicitation,
    test_elicitation_sep1034_defaults,
    test_elicitation_sep1330_enums,
    test_missing_capability,
]


# Calls that end with a question, and come again with the answer (SEP-2322)


async def test_input_required_result_elicitation(ctx: Context) -> Answer:
    """Asks for a name."""
    name = _answered(ctx, "user_name", "name")
    return f"Hello, {name}!" if name else _asks(user_name=_form("What is your name?", "name"))


async def test_streaming_elicitation(ctx: Context) -> Answer:
    """Asks within a stream."""
    return await test_input_required_result_elicitation(ctx)


async def test_input_required_result_sampling(ctx: Context) -> Answer:
    """Asks the client's model."""
    said = (ctx.input_responses or {}).get("capital")
    if isinstance(said, types.CreateMessageResult):
        return f"It said: {said.content}"
    return _asks(capital=_sample("What is the capital of France?"))


async def test_input_required_result_list_roots(ctx: Context) -> Answer:
    """Asks for the client's roots."""
    roots = (ctx.input_responses or {}).get("roots")
    if isinstance(roots, types.ListRootsResult):
        return f"There are {len(roots.roots)}."
    return _asks(roots=types.ListRootsRequest())


async def test_input_required_result_request_state(ctx: Context) -> Answer:
    """Asks, and gets its state back."""
    if ctx.request_state == "asked" and _answered(ctx, "confirm", "ok"):
        return "state-ok"
    return _asks("asked", confirm=_form("Please confirm", "ok", "boolean"))


async def test_input_required_result_tampered_state(ctx: Context) -> Answer:
    """Asks; another state than its own never comes back."""
    return await test_input_required_result_request_state(ctx)


async def test_input_required_result_multiple_inputs(ctx: Context) -> Answer:
    """Asks three things at once."""
    questions = {
        "user_name": _form("What is your name?", "name"),
        "greeting": _sample("Generate a greeting"),
        "client_roots": types.ListRootsRequest(),
    }
    if questions.keys() <= (ctx.input_responses or {}).keys():
        return "All of them came."
    return _asks("three", **questions)


async def test_input_required_result_multi_round(ctx: Context) -> Answer:
    """Asks a second time after the first answer."""
    if ctx.request_state is None:
        return _asks("1", step1=_form("Step 1: What is your name?", "name"))
    if name := _answered(ctx, "step1", "name"):
        return _asks(f"2 {name}", step2=_form("Step 2: What is your favorite color?", "color"))
    return f"{ctx.request_state.removeprefix('2 ')} likes {_answered(ctx, 'step2', 'color')}."


async def test_input_required_result_capabilities(ctx: Context) -> types.InputRequiredResult:
    """Asks only what the client can answer."""
    can = ctx.client_capabilities
    questions: dict[str, Any] = {}
    if can is None or can.sampling is not None:
        questions["sample"] = _sample("Say hello")
    if can is None or can.elicitation is not None:
        questions["name"] = _form("What is your name?", "name")
    return _asks("asked", **questions)


def _asks(state: str | None = None, **questions: Any) -> types.InputRequiredResult:
    return types.InputRequiredResult(input_requests=questions, request_state=state)


def _form(message: str, field: str, kind: str = "string") -> types.ElicitRequest:
    schema = {"type": "object", "properties": {field: {"type": kind}}, "required": [field]}
    params = types.ElicitRequestFormParams(message=message, requested_schema=schema)
    return types.ElicitRequest(params=params)


def _sample(text: str) -> types.CreateMessageRequest:
    params = types.CreateMessageRequestParams(messages=[_user(text)], max_tokens=50)
    return types.CreateMessageRequest(params=params)


def _user(text: str) -> types.SamplingMessage:
    return types.SamplingMessage(role="user", content=types.TextContent(type="text", text=text))


def _answered(ctx: Context, question: str, field: str) -> Any:
    """What the user wrote into `field`; None before the answer."""
    answer = (ctx.input_responses or {}).get(question)
    is_form = isinstance(answer, types.ElicitResult) and answer.content
    return answer.content.get(field) if is_form else None


INPUT_REQUIRED: list[Callable[..., Awaitable[Any]]] = [
    test_input_required_result_elicitation,
    test_streaming_elicitation,
    test_input_required_result_sampling,
    test_input_required_result_list_roots,
    test_input_required_result_request_state,
    test_input_required_result_tampered_state,
    test_input_required_result_multiple_inputs,
    test_input_required_result_multi_round,
    test_input_required_result_capabilities,
]


# Prompts


def test_simple_prompt() -> str:
    """Without arguments."""
    return "This is a simple prompt for testing."


def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
    """With two arguments."""
    return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"


def test_prompt_with_embedded_resource(resourceUri: str) -> list[UserMessage]:  # the suite's name
    """With a resource."""
    text = "Embedded resource content for testing."
    return [
        UserMessage(_embedded(resourceUri, "text/plain", text)),
        UserMessage("Please process the embedded resource above."),
    ]


def test_prompt_with_image() -> list[UserMessage]:
    """With an image."""
    return [UserMessage(_image()), UserMessage("Please analyze the image above.")]


async def test_input_required_result_prompt(
    ctx: Context,
) -> list[UserMessage] | types.InputRequiredResult:
    """Asks before it answers."""
    context = _answered(ctx, "user_context", "context")
    if context is None:
        return _asks(user_context=_form("What context should it use?", "context"))
    return [UserMessage(f"Use this context: {context}")]


PROMPTS: list[Callable[..., Any]] = [
    test_simple_prompt,
    test_prompt_with_arguments,
    test_prompt_with_embedded_resource,
    test_prompt_with_image,
    test_input_required_result_prompt,
]


# What is bound to one server


def _list_changes(server: MCPServer[Any]) -> list[Callable[..., Awaitable[str]]]:
    """Tools that change what the server lists, and say so."""

    async def test_trigger_tool_change(ctx: Context) -> str:
        """Adds a tool and takes it away."""
        server.add_tool(test_simple_text, name="test_dynamic_tool")
        server.remove_tool("test_dynamic_tool")
        await ctx.notify_tools_changed()
        return "The list of tools changed."

    async def test_trigger_prompt_change(ctx: Context) -> str:
        """Adds a prompt and takes it away."""
        server.add_prompt(Prompt.from_function(test_simple_prompt, name="test_dynamic_prompt"))
        server.remove_prompt("test_dynamic_prompt")
        await ctx.notify_prompts_changed()
        return "The list of prompts changed."

    return [test_trigger_tool_change, test_trigger_prompt_change]


def _add_tool_with_schema(
    server: MCPServer[Any], fn: Callable[..., Any], schema: dict[str, Any]
) -> None:
    tool = Tool.from_function(fn).model_copy(update={"parameters": schema})
    server._tool_manager._tools[tool.name] = tool  # add_tool takes functions only


def _mount_resources(server: MCPServer[Any]) -> None:
    @server.resource("test://static-text", mime_type="text/plain")
    def text() -> str:
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", mime_type="image/png")
    def binary() -> bytes:
        return base64.b64decode(PNG)

    @server.resource("test://watched-resource", mime_type="text/plain")
    def watched() -> str:
        return "Watched"

    @server.resource("test://template/{id}/data", mime_type="application/json")
    def template(id: str) -> str:
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


def _mount_handlers(server: MCPServer[Any]) -> None:
    """Requests of older revisions that our server has no use for."""

    async def acknowledge(_: Any, __: Any) -> types.EmptyResult:
        return types.EmptyResult()

    for method, params in {
        "logging/setLevel": types.SetLevelRequestParams,
        "resources/subscribe": types.SubscribeRequestParams,
        "resources/unsubscribe": types.UnsubscribeRequestParams,
    }.items():
        server._lowlevel_server.add_request_handler(method, params, acknowledge)
