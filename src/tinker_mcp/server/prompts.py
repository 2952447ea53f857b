"""The prompts: one workflow a file, in `prompts/` beside this package or at the repository's top.

A file begins with frontmatter (name, title, description, arguments). In its text `{a|b|words}`
stands for the first argument of these that was given, or else for the words. Braces that do not
begin with a name and end or go on with a bar, such as those of JSON, are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.prompts import Prompt
from mcp.server.mcpserver.prompts.base import Message, PromptArgument, UserMessage
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS

_PACKAGE = Path(__file__).parents[1]
_FENCE = "---\n"
_CHOICE = re.compile(r"\{([a-z]\w*(?:\|[^{}]*)?)\}")


@dataclass(frozen=True)
class Workflow:
    """One file of `prompts/`."""

    name: str
    title: str
    description: str
    arguments: tuple[PromptArgument, ...]
    text: str

    def told(self, given: Mapping[str, str]) -> str:
        """The text with the arguments in their places."""
        names = {argument.name for argument in self.arguments}

        def chosen(match: re.Match[str]) -> str:
            for part in match[1].split("|"):
                if part not in names:
                    return part
                if given.get(part):
                    return given[part]
            return match[0]

        return _CHOICE.sub(chosen, self.text)


class WorkflowPrompt(Prompt):
    """A workflow as MCP serves it; wrong arguments are the caller's fault and named."""

    async def render(
        self, arguments: dict[str, Any] | None, context: Context[Any, Any]
    ) -> list[Message]:
        given, known = arguments or {}, self.arguments or []
        missing = [a.name for a in known if a.required and not given.get(a.name)]
        unknown = sorted(set(given) - {a.name for a in known})
        if missing or unknown:
            wrong = [f"the argument {name!r} is missing" for name in missing]
            wrong += [f"there is no argument {name!r}" for name in unknown]
            takes = ", ".join(a.name for a in known)
            problem = f"The prompt {self.name} takes {takes}: {'; '.join(wrong)}."
            raise MCPError(code=INVALID_PARAMS, message=problem)
        return [UserMessage(str(self.fn(given)))]


def folder(name: str) -> Path:
    """Files that a wheel carries inside the package and a checkout has at its top."""
    packaged = _PACKAGE / name
    return packaged if packaged.exists() else _PACKAGE.parents[1] / name


def workflows() -> list[Workflow]:
    """All of them, by name."""
    return [parsed(path.read_text("utf-8")) for path in sorted(folder("prompts").glob("*.md"))]


def prompts() -> list[Prompt]:
    """The workflows as prompts of a server."""
    return [
        WorkflowPrompt(
            name=workflow.name,
            title=workflow.title,
            description=workflow.description,
            arguments=list(workflow.arguments),
            fn=workflow.told,
            context_kwarg=None,
        )
        for workflow in workflows()
    ]


def parsed(text: str) -> Workflow:
    """Read one file; the frontmatter is the part of YAML that these files use.

    Raises:
        ValueError: It has no frontmatter, lacks name, title or description, or has a place for
            an argument that it does not have.
    """
    _, head, body = text.split(_FENCE, 2)
    top, arguments = _frontmatter(head)
    if lacking := {"name", "title", "description"} - set(top):
        raise ValueError(f"The frontmatter lacks {', '.join(sorted(lacking))}.")
    described = tuple(
        PromptArgument(
            name=argument["name"],
            description=argument.get("description"),
            required=argument.get("required") == "true",
        )
        for argument in arguments
    )
    names = {argument.name for argument in described}
    for place in _CHOICE.finditer(body):
        if place[1].split("|")[0] not in names:
            raise ValueError(f"{place[0]} names no argument.")
    return Workflow(top["name"], top["title"], top["description"], described, body.strip())


def _frontmatter(head: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    top: dict[str, str] = {}
    arguments: list[dict[str, str]] = []
    for indent, key, value in _fields(head):
        if indent == "":
            top[key] = value
        elif "-" in indent:
            arguments.append({key: value})
        else:
            arguments[-1][key] = value
    return top, arguments


def _fields(head: str) -> Iterator[tuple[str, str, str]]:
    for line in head.splitlines():
        if match := re.fullmatch(r"([ -]*)(\w+):\s*(.*)", line):
            yield match[1], match[2], match[3].strip()
