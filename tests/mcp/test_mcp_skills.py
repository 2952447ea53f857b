"""The skill over MCP: what it lists is what a host reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, PaginatedRequestParams, Request, Resource

from tinker_mcp.server import create_server
from tinker_mcp.server.skills import (
    AboutDirectory,
    AboutUri,
    DirectoryResult,
    GetSkillResult,
    ListSkillsResult,
    SkillEntry,
    frontmatter,
)
from tinker_mcp.settings import Settings

ROOT = Path(__file__).parents[2]
SKILL = ROOT / "SKILL.md"


@asynccontextmanager
async def connected() -> AsyncIterator[Client]:
    async with Client(create_server(Settings())) as client:
        yield client


async def asked(client: Client, method: str, params: Any, answer: Any) -> Any:
    return await client.session.send_request(Request(method=method, params=params), answer)


async def listed(client: Client) -> SkillEntry:
    found = await asked(client, "skills/list", PaginatedRequestParams(), ListSkillsResult)
    [entry] = found.skills
    return SkillEntry.model_validate(entry)


async def children(client: Client, uri: str) -> list[Resource]:
    about = AboutDirectory(uri=uri)
    found = await asked(client, "resources/directory/read", about, DirectoryResult)
    return list(found.resources)


async def test_each_file_of_the_skill_reads_as_its_digest_says() -> None:
    async with connected() as client:
        entry = await listed(client)
        for file in entry.resources:
            [content] = (await client.read_resource(file.uri)).contents
            read = str(getattr(content, "text", "")).encode()
            assert len(read) == file.size
            assert f"sha256:{hashlib.sha256(read).hexdigest()}" == file.digest


async def test_the_frontmatter_is_what_yaml_reads_in_the_file() -> None:
    async with connected() as client:
        head = SKILL.read_text().split("---\n")[1]
        assert (await listed(client)).frontmatter == yaml.safe_load(head)


async def test_every_path_that_the_skill_names_is_one_of_its_files() -> None:
    async with connected() as client:
        entry = await listed(client)
        uris = {file.uri for file in entry.resources}
        named = re.findall(r"(?:scripts|prompts|src/tinker_mcp/docs)/\w+\.\w+", SKILL.read_text())
        assert named
        assert {f"skill://tinker-mcp/{path}" for path in named} <= uris


async def test_a_skill_is_found_by_its_address() -> None:
    async with connected() as client:
        entry = await listed(client)
        found = await asked(client, "skills/get", AboutUri(uri=entry.uri), GetSkillResult)
        assert found.skill == entry


async def test_another_address_is_refused_with_the_right_one() -> None:
    async with connected() as client:
        with pytest.raises(MCPError, match=r"there is: skill://tinker-mcp/SKILL\.md") as refused:
            await asked(client, "skills/get", AboutUri(uri="skill://none/SKILL.md"), GetSkillResult)
        assert refused.value.code == INVALID_PARAMS


async def test_its_folders_are_read_level_by_level() -> None:
    async with connected() as client:
        root = "skill://tinker-mcp"
        kinds = {child.name: child.mime_type for child in await children(client, root)}
        assert kinds["SKILL.md"] == "text/markdown"
        assert {kinds[name] for name in ("prompts", "scripts", "src")} == {"inode/directory"}
        scripts = await children(client, f"{root}/scripts")
        assert {script.mime_type for script in scripts} == {"text/x-python"}
        pages = {page.name for page in await children(client, f"{root}/src/tinker_mcp/docs")}
        assert pages == {path.name for path in (ROOT / "src" / "tinker_mcp" / "docs").glob("*.md")}


@pytest.mark.parametrize(
    "uri", ["skill://tinker-mcp/SKILL.md", "skill://tinker-mcp/none", "skill:/", "skill://tinker"]
)
async def test_what_is_no_folder_is_not_read_as_one(uri: str) -> None:
    async with connected() as client:
        with pytest.raises(MCPError) as refused:
            await children(client, uri)
        assert refused.value.code == INVALID_PARAMS


@pytest.mark.parametrize("name", ["none.md", "..%2Fpyproject.toml", ".."])
async def test_no_other_file_is_read_through_the_skill(name: str) -> None:
    async with connected() as client:
        with pytest.raises(MCPError):
            await client.read_resource(f"skill://tinker-mcp/prompts/{name}")


def test_folded_quoted_and_nested_frontmatter_reads_as_yaml_does() -> None:
    head = "name: x\ndescription: >-\n  One\n  two.\nmetadata:\n  version: \"1.0\"\n  by: 'us'\n"
    assert frontmatter(f"---\n{head}---\nText\n") == yaml.safe_load(head)


def test_frontmatter_of_another_kind_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match="- two"):
        frontmatter("---\nname:\n- two\n---\n")
