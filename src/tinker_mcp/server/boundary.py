"""How a function becomes a tool: strict arguments, annotations, errors as text.

This is the only place that turns an exception into words for the agent.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import structlog
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase, FuncMetadata
from mcp_types import CallToolResult, ToolAnnotations
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.server.progress import LiveContext, signs_of_life
from tinker_mcp.server.reply_size import fitted
from tinker_mcp.server.schemas import short_input, short_output
from tinker_mcp.training import recovery

log = structlog.get_logger()

MAX_ERROR_CHARACTERS = 1500
_CONTEXT = "ctx"  # the argument that is the server's, not the agent's


@dataclass(frozen=True)
class ToolSpec:
    """A function and what hosts are told of it beside its docstring and types.

    Attributes:
        toolset: The group that `--toolsets` selects it by.
    """

    fn: Callable[..., Any]
    title: str
    annotations: ToolAnnotations
    toolset: str


def reads(fn: Callable[..., Any], title: str, *, toolset: str | None = None) -> ToolSpec:
    """A tool that changes nothing and spends nothing."""
    hints = ToolAnnotations(
        read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=True
    )
    return ToolSpec(fn, title, hints, toolset or _room(fn))


def changes(fn: Callable[..., Any], title: str, *, toolset: str | None = None) -> ToolSpec:
    """A tool that creates, trains or spends something, and destroys nothing."""
    hints = ToolAnnotations(
        read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=True
    )
    return ToolSpec(fn, title, hints, toolset or _room(fn))


def destroys(fn: Callable[..., Any], title: str, *, toolset: str | None = None) -> ToolSpec:
    """A tool that can delete what cannot be made again."""
    hints = ToolAnnotations(
        read_only_hint=False, destructive_hint=True, idempotent_hint=False, open_world_hint=True
    )
    return ToolSpec(fn, title, hints, toolset or _room(fn))


def _room(fn: Callable[..., Any]) -> str:
    """The module of `tools/` that it stands in, which is its group where nothing else is said."""
    return fn.__module__.rpartition(".")[2]


class _Strict(ArgModelBase):
    # inf: the SDK sends it as null, which the backend refuses after the request got its number;
    # all later requests of that client would wait for it.
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


class StrictTool(Tool):
    """A tool that refuses unknown arguments, shows that it lives and explains its errors."""

    replies: Path | None = Field(default=None, exclude=True)

    @classmethod
    def of(cls, spec: ToolSpec, replies: Path) -> Tool:
        """Make the tool of a specification; `replies` is the folder for what is too long."""
        # Not from_function: it makes models and schemas that are looser and longer than ours, and
        # to make them anew takes twice the time that a host waits for the list of tools.
        signature = inspect.signature(spec.fn, eval_str=True)
        arguments = _arguments(spec.fn.__name__, signature)
        reply = _reply_model(signature)
        return cls(
            fn=spec.fn,
            name=spec.fn.__name__,
            title=spec.title,
            description=_unwrapped(inspect.getdoc(spec.fn) or ""),
            parameters=short_input(arguments.model_json_schema()),
            fn_metadata=FuncMetadata(
                arg_model=arguments,
                output_model=reply,
                output_schema=short_output(reply.model_fields),
            ),
            is_async=inspect.iscoroutinefunction(spec.fn),
            context_kwarg=_CONTEXT if _CONTEXT in signature.parameters else None,
            annotations=spec.annotations,
            replies=replies,
        )

    async def run(
        self, arguments: dict[str, Any], context: Any, convert_result: bool = False
    ) -> Any:
        try:
            validated = self._validated(arguments)
        except ValidationError as error:
            raise ToolError(self._explain(error)) from error
        live = LiveContext.of(context)
        extra = {self.context_kwarg: live} if self.context_kwarg else {}
        try:
            async with signs_of_life(live, self.name):
                with recovery.notes() as notes:
                    result = await self.fn_metadata.call_fn(
                        self.fn, self.is_async, validated, extra
                    )
            result = _with_notes(result, notes)
            return self._reply(result) if convert_result else result
        except TinkerMcpError as error:
            raise ToolError(told(error)) from error
        except Exception as error:
            log.error("tool_crashed", tool=self.name, exc_info=error)
            raise UnexpectedToolError(
                f"internal: {self.name} failed unexpectedly ({type(error).__name__}). "
                "This is a fault of tinker-mcp; its log (stderr) has the details. "
                "Call check_setup, then try again."
            ) from error

    def _validated(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments as the function takes them; none is coerced to another type.

        Raises:
            ValidationError: One is unknown, missing or not what the schema says.
        """
        decoded = {name: self._decoded(name, value) for name, value in arguments.items()}
        # As JSON: there, strict takes a string for a member of an enum, and nothing for a number.
        model = self.fn_metadata.arg_model.model_validate_json(json.dumps(decoded), strict=True)
        return model.model_dump_one_level()

    def _decoded(self, name: str, value: Any) -> Any:
        """An object or list that came as JSON text, as Claude Desktop sends them."""
        takes = self.parameters["properties"].get(name, {}).get("type")
        if takes not in ("object", "array") or not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value

    def _reply(self, result: Any) -> Any:
        converted = self.fn_metadata.convert_result(result)
        if self.replies is None or not isinstance(converted, CallToolResult):
            return converted
        return fitted(converted, self.name, self.replies)

    def _explain(self, error: ValidationError) -> str:
        said = problems(error, self.fn_metadata.arg_model)
        return _cut(f"invalid_input: {self.name}: {said}", MAX_ERROR_CHARACTERS)


def problems(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with the arguments that `model` takes, with the name that may be meant."""
    schema = model.model_json_schema(by_alias=True)
    return "; ".join(_problem(item, _properties(schema, item["loc"])) for item in error.errors())


def _arguments(tool: str, signature: inspect.Signature) -> type[_Strict]:
    fields: dict[str, Any] = {
        parameter.name: (
            parameter.annotation,
            ... if parameter.default is inspect.Parameter.empty else parameter.default,
        )
        for parameter in signature.parameters.values()
        if parameter.name != _CONTEXT
    }
    return create_model(f"{tool}Arguments", __base__=_Strict, **fields)


def _reply_model(signature: inspect.Signature) -> type[BaseModel]:
    """The type of the reply; behind a CallToolResult, which holds pictures too, it is noted."""
    declared = signature.return_annotation
    model: type[BaseModel] = get_args(declared)[1] if get_args(declared) else declared
    return model


def _with_notes(result: Any, notes: list[str]) -> Any:
    """The reply, its next step preceded by what else has happened in this call."""
    if not notes:
        return result
    return result.model_copy(update={"next_step": " ".join([*notes, result.next_step])})


def _unwrapped(docstring: str) -> str:
    """Its paragraphs, each in one line."""
    return "\n".join(" ".join(part.split()) for part in docstring.split("\n\n"))


def told(error: TinkerMcpError) -> str:
    """The code, the problem and the next step; a long problem is cut, the next step never."""
    room = MAX_ERROR_CHARACTERS - len(error.code) - len(error.next_step) - len(":  ")
    return f"{error.code}: {_cut(error.problem, room)} {error.next_step}".rstrip()


def _properties(schema: dict[str, Any], place: tuple[str | int, ...]) -> list[str]:
    """The names that the innermost object of `place` takes."""
    if len(place) == 1:
        return list(schema.get("properties", {}))
    nested = schema.get("$defs", {}).values()  # few and of different names: no need to follow $ref
    return [name for definition in nested for name in definition.get("properties", {})]


def _problem(item: Any, known: list[str]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        takes = f"it takes {', '.join(known) or 'no arguments'}."
        hint = f"did you mean {close[0]!r}?" if close else takes
        return f"unknown argument {name!r}; {hint}"
    if item["type"] == "missing":
        return f"the argument {name!r} is missing."
    return f"{name}={item['input']!r:.80}: {item['msg']}."


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
