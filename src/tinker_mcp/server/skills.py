"""Skills over MCP (SEP-2640): SKILL.md and the files it leads to, as resources with digests.

A listing tells each file's digest and size, so that a host can show what it would load, and check
what it then reads. The paths are those of a checkout, so that the links in SKILL.md hold in both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mcp.server.extension import Extension, MethodBinding, ResourceBinding
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceNotFoundError
from mcp.server.mcpserver.resources import FunctionResource
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    CacheableResult,
    PaginatedRequestParams,
    PaginatedResult,
    RequestParams,
    Resource,
)
from pydantic import BaseModel

from tinker_mcp.server.prompts import folder
from tinker_mcp.training.clients import Workspace

MARKDOWN, PYTHON, DIRECTORY = "text/markdown", "text/x-python", "inode/directory"
_MAIN = "SKILL.md"
_TTL_MS = 3_600_000  # the files come with the server
_TOP_KEY = re.compile(r"([\w-]+):\s*(.*)")
_INNER_KEY = re.compile(r" +([\w-]+):\s+(.+)")
_DOCS = Path(__file__).parents[1] / "docs"


class SkillResource(BaseModel):
    """A file of a skill, as a listing tells of it."""

    uri: str
    digest: str
    size: int


class SkillEntry(BaseModel):
    """A skill: its frontmatter as it is written, and all of its files."""

    uri: str
    frontmatter: dict[str, Any]
    resources: list[SkillResource]


class ListSkillsResult(PaginatedResult, CacheableResult):
    """What `skills/list` answers."""

    skills: list[SkillEntry]


class GetSkillResult(CacheableResult):
    """What `skills/get` answers."""

    skill: SkillEntry


class DirectoryResult(PaginatedResult):
    """What `resources/directory/read` answers."""

    resources: list[Resource]


class AboutUri(RequestParams):
    """A request about one skill."""

    uri: str


class AboutDirectory(PaginatedRequestParams):
    """A request about one folder of a skill."""

    uri: str


@dataclass(frozen=True)
class Skill:
    """A skill as it lies on disk.

    Attributes:
        files: Where each file is, by its path within the skill; SKILL.md is the first.
    """

    frontmatter: dict[str, Any]
    files: dict[str, Path]

    @property
    def root(self) -> str:
        return f"skill://{self.frontmatter['name']}"

    @property
    def uri(self) -> str:
        return f"{self.root}/{_MAIN}"

    def text(self, path: str) -> str:
        """A file's text, byte for byte: its digest is checked.

        Raises:
            ResourceNotFoundError: The skill has no such file.
        """
        if path not in self.files:
            raise ResourceNotFoundError(f"No file {path!r}; there are: {', '.join(self.files)}.")
        return self.files[path].read_bytes().decode()

    def entry(self) -> SkillEntry:
        """What a listing says of it now."""
        contents = {path: file.read_bytes() for path, file in self.files.items()}
        resources = [
            SkillResource(
                uri=f"{self.root}/{path}",
                digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
                size=len(content),
            )
            for path, content in contents.items()
        ]
        return SkillEntry(uri=self.uri, frontmatter=self.frontmatter, resources=resources)

    def children(self, uri: str) -> list[Resource]:
        """What lies directly in a folder of the skill; nothing where there is no such folder."""
        inside, root = f"{uri}/", f"{self.root}/"
        if not inside.startswith(root):
            return []
        kinds: dict[str, str] = {}
        for path in self.files:
            if path.startswith(within := inside.removeprefix(root)):
                name, slash, _ = path.removeprefix(within).partition("/")
                kinds[name] = DIRECTORY if slash else _mime_type(name)
        return [
            Resource(uri=f"{uri}/{name}", name=name, mime_type=kind) for name, kind in kinds.items()
        ]


class Skills(Extension):
    """The extension `io.modelcontextprotocol/skills`; its files are read as any resource is."""

    identifier = "io.modelcontextprotocol/skills"

    def settings(self) -> dict[str, Any]:
        return {"directoryRead": True}

    def resources(self) -> Sequence[ResourceBinding]:
        skill = installed()
        main = FunctionResource(
            uri=skill.uri,
            name=skill.frontmatter["name"],
            description=skill.frontmatter["description"],
            mime_type=MARKDOWN,
            fn=partial(skill.text, _MAIN),
        )
        return [ResourceBinding(main)]

    def methods(self) -> Sequence[MethodBinding]:
        return [
            MethodBinding("skills/list", PaginatedRequestParams, _list),
            MethodBinding("skills/get", AboutUri, _get),
            MethodBinding("resources/directory/read", AboutDirectory, _read_directory),
        ]


def extensions() -> list[Extension]:
    """The extension; none where the package came without its skill."""
    return [Skills()] if folder(_MAIN).exists() else []


def add_skill_files(server: MCPServer[Workspace]) -> None:
    """Let the files beside SKILL.md be read; they are named by `skills/list`, not as resources."""
    if not folder(_MAIN).exists():
        return
    skill = installed()
    for part, (_, pattern) in _parts().items():
        server.resource(
            f"{skill.root}/{part}/{{name}}",
            name=f"skill-{part.rpartition('/')[2]}",
            description=f"A file of the skill: {part}/{pattern}.",
            mime_type=_mime_type(pattern),
        )(_reader(skill, part))


def installed() -> Skill:
    """The skill that came with this package, as it is now."""
    files = {_MAIN: folder(_MAIN)}
    for part, (place, pattern) in _parts().items():
        files |= {f"{part}/{file.name}": file for file in sorted(place.glob(pattern))}
    return Skill(frontmatter(files[_MAIN].read_text("utf-8")), files)


def frontmatter(markdown: str) -> dict[str, Any]:
    """The head of SKILL.md: the part of YAML that it uses, texts and one level of nested texts.

    PyYAML would take 30 ms of each start.

    Raises:
        ValueError: It uses another part.
    """
    fields: dict[str, Any] = {}
    key = ""
    for line in markdown.split("---\n", 2)[1].splitlines():
        if match := _TOP_KEY.fullmatch(line):
            key, value = match.groups()
            fields[key] = {} if value == "" else "" if value == ">-" else _plain(value)
        elif (match := _INNER_KEY.fullmatch(line)) and isinstance(fields[key], dict):
            fields[key][match[1]] = _plain(match[2])
        elif line.startswith(" ") and isinstance(fields[key], str):
            fields[key] = f"{fields[key]} {line.strip()}".strip()
        else:
            raise ValueError(f"The frontmatter has a line that is not read here: {line!r}.")
    return fields


def _parts() -> dict[str, tuple[Path, str]]:
    """The folders of the skill beside SKILL.md, each with its place and its files."""
    return {
        "prompts": (folder("prompts"), "*.md"),
        "scripts": (folder("scripts"), "*.py"),
        "src/tinker_mcp/docs": (_DOCS, "*.md"),
    }


async def _list(_: Any, __: PaginatedRequestParams) -> ListSkillsResult:
    return ListSkillsResult(skills=[installed().entry()], ttl_ms=_TTL_MS, cache_scope="public")


async def _get(_: Any, asked: AboutUri) -> GetSkillResult:
    skill = installed()
    if asked.uri != skill.uri:
        raise MCPError(INVALID_PARAMS, f"No skill {asked.uri!r}; there is: {skill.uri}.")
    return GetSkillResult(skill=skill.entry(), ttl_ms=_TTL_MS, cache_scope="public")


async def _read_directory(_: Any, asked: AboutDirectory) -> DirectoryResult:
    skill = installed()
    children = skill.children(asked.uri)
    if not children:
        raise MCPError(INVALID_PARAMS, f"No folder {asked.uri!r}; the skill's is {skill.root}.")
    return DirectoryResult(resources=children)


def _reader(skill: Skill, part: str) -> Any:
    def read(name: str) -> str:
        return skill.text(f"{part}/{name}")

    return read


def _plain(value: str) -> str:
    return value[1:-1] if value[0] == value[-1] and value[0] in "\"'" else value


def _mime_type(name: str) -> str:
    return PYTHON if name.endswith(".py") else MARKDOWN
