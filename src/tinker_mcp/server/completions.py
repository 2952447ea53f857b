"""Completions: values for the arguments of prompts and resource templates, from what exists."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import get_args

import anyio
from mcp.server.mcpserver import MCPServer
from mcp_types import (
    Completion,
    CompletionArgument,
    CompletionContext,
    PromptReference,
    ResourceTemplateReference,
)

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.runs.spec import Method
from tinker_mcp.server import docs, resources
from tinker_mcp.training.clients import Workspace

MAX_VALUES = 100  # the protocol's limit
QUESTIONS = ("base_or_instruct", "noisy_student", "pairwise_judge", "memory_rate", "humor_gan")
"""The questions that the prompt research_idea has in its text."""
_PATIENCE_S = 3.0  # somebody is typing

Values = Callable[[Workspace], Awaitable[list[str]]]


def add_completions(server: MCPServer[Workspace], opened: resources.Opened) -> None:
    """Answer completion/complete by the argument's name."""

    @server.completion()  # type: ignore[no-untyped-call, untyped-decorator]
    async def complete(
        ref: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        context: CompletionContext | None,
    ) -> Completion:
        of = _VALUES.get(argument.name)
        values = [] if of is None else await _soon(of, opened())
        return fitting(values, argument.value)


def fitting(values: list[str], begun: str) -> Completion:
    """The values that contain what was typed, those that begin with it first."""
    typed = begun.lower()
    fits = [value for value in values if typed in value.lower()]
    fits.sort(key=lambda value: not value.lower().startswith(typed))
    return Completion(values=fits[:MAX_VALUES], total=len(fits), has_more=len(fits) > MAX_VALUES)


async def _soon(of: Values, workspace: Workspace) -> list[str]:
    values: list[str] = []
    with anyio.move_on_after(_PATIENCE_S):
        try:
            values = await of(workspace)
        except TinkerMcpError:
            return []  # a field without suggestions, not an error while somebody types
    return values


async def _clients(workspace: Workspace) -> list[str]:
    return list(workspace.clients)


async def _models(workspace: Workspace) -> list[str]:
    return [row["name"] for row in (await resources.models(workspace))["models"]]


async def _checkpoints(workspace: Workspace) -> list[str]:
    return [row["checkpoint"] for row in (await resources.checkpoints(workspace))["checkpoints"]]


async def _runs(workspace: Workspace) -> list[str]:
    return [row["run_id"] for row in (await resources.runs(workspace))["runs"]]


async def _pages(workspace: Workspace) -> list[str]:
    return docs.page_names()


async def _methods(workspace: Workspace) -> list[str]:
    return list(get_args(Method))


async def _questions(workspace: Workspace) -> list[str]:
    return list(QUESTIONS)


_VALUES: Mapping[str, Values] = {
    "client_id": _clients,
    "base_model": _models,
    "checkpoint": _checkpoints,
    "other": _checkpoints,
    "run_id": _runs,
    "method": _methods,
    "question": _questions,
    "page": _pages,
}
