"""A reply that is too long is cut, and the whole of it lies in a file for its owner only."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from agents import in_memory
from mcp_types import CallToolResult, ResourceLink, TextContent

from tinker_mcp.server.reply_size import KEPT_FILES, MAX_REPLY_BYTES, fitted
from tinker_mcp.settings import Settings


def reply(**fields: Any) -> CallToolResult:
    whole = {**fields, "next_step": "Call it again."}
    text = TextContent(type="text", text=json.dumps(whole, indent=2))
    return CallToolResult(content=[text], structured_content=whole)


def text_of(result: CallToolResult) -> str:
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


def test_a_short_reply_stays_as_it_is(tmp_path: Path) -> None:
    short = reply(text="a" * 1000)
    assert fitted(short, "tool", tmp_path / "replies") is short
    assert not (tmp_path / "replies").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "a" * 100_000},
        {"text": "語" * 10_000},
        {"losses": [0.123456] * 20_000},
        {"texts": ["word " * 100] * 500},
        {"rows": [{"name": f"row {n}", "text": "b" * 3000} for n in range(64)]},
        {"rows": [{"name": f"row {n}"} for n in range(5_000)]},
    ],
    ids=["text", "wide-text", "numbers", "texts", "long-rows", "many-rows"],
)
def test_a_long_reply_is_cut_and_its_file_has_it_all(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    long = reply(**fields)
    short = fitted(long, "tool", tmp_path / "replies")
    assert short.structured_content is not None
    assert json.loads(text_of(short)) == short.structured_content
    assert len(text_of(short).encode()) <= MAX_REPLY_BYTES
    (path,) = (tmp_path / "replies").iterdir()
    assert json.loads(path.read_text()) == long.structured_content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    link = short.content[1]
    assert isinstance(link, ResourceLink)
    assert str(link.uri) == f"tinker-mcp://replies/{path.name}"
    assert str(path) in short.structured_content["next_step"]
    assert short.structured_content["next_step"].startswith("Call it again.")


def test_what_was_cut_says_how_much_there_was(tmp_path: Path) -> None:
    short = fitted(reply(text="a" * 20_000, few=["b"]), "tool", tmp_path).structured_content or {}
    assert short["text"].endswith("... (18000 more characters)")
    assert short["few"] == ["b"]
    many = fitted(reply(texts=["word " * 10] * 2_000), "tool", tmp_path).structured_content or {}
    assert many["texts"][-1] == "... (1800 more)"


def test_a_reply_that_cannot_be_kept_is_cut_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "replies").write_text("no folder")
    short = fitted(reply(text="a" * 20_000), "tool", tmp_path / "replies")
    assert len(short.content) == 1
    assert "could not be kept (File exists)" in (short.structured_content or {})["next_step"]


def test_only_the_newest_files_are_kept(tmp_path: Path) -> None:
    for _ in range(KEPT_FILES + 5):
        fitted(reply(text="a" * 20_000), "tool", tmp_path)
    assert len(list(tmp_path.iterdir())) == KEPT_FILES


async def test_a_long_reply_of_a_tool_can_be_read_as_a_resource(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        asked = {"client_id": client_id, "prompt": "Say", "num_samples": 16, "max_tokens": 1000}
        result = await agent.client.call_tool("sample", asked)
        assert not result.is_error
        links = [part for part in result.content if isinstance(part, ResourceLink)]
        whole = [await agent.client.read_resource(str(link.uri)) for link in links]
    assert len(text_of(result).encode()) <= MAX_REPLY_BYTES
    assert [getattr(read.contents[0], "mime_type", "") for read in whole] == [
        "application/json"
    ] * len(links)
