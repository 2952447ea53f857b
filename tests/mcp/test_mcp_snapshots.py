"""What hosts are told of the tools: nothing changes unseen, and it stays cheap."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.schema_snapshots import SNAPSHOTS, snapshot, tools
from tinker_mcp.server.app import TOOLS

RENEW = "If that is meant: python -m tests.schema_snapshots"

MAX_TOOLS = 25
CHARACTERS_A_TOKEN = 4  # of JSON, by the tokenizers we have; counting needs no download
# As it is today, rounded up; for 25 tools the goal is 7,000 and 5,000.
MAX_TOKENS = 6_600
MAX_VISIBLE_TOKENS = 4_600
VISIBLE = ("name", "description", "inputSchema")


def tokens(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False)) // CHARACTERS_A_TOKEN


@pytest.mark.parametrize("name", [spec.fn.__name__ for spec in TOOLS])
async def test_what_hosts_are_told_of_it_is_as_in_its_snapshot(name: str) -> None:
    path = SNAPSHOTS / f"{name}.json"
    assert path.exists(), f"{name} is new. {RENEW}"
    assert snapshot((await tools())[name]) == path.read_text(), RENEW


async def test_no_snapshot_is_of_a_tool_that_went() -> None:
    assert {path.stem for path in SNAPSHOTS.glob("*.json")} == set(await tools()), RENEW


async def test_there_are_no_more_tools_than_a_host_shows_well() -> None:
    assert len(await tools()) <= MAX_TOOLS


async def test_the_list_costs_no_more_than_it_did() -> None:
    told = list((await tools()).values())
    whole = tokens(told)
    visible = tokens([{key: tool[key] for key in VISIBLE} for tool in told])
    print(f"tools/list: {len(told)} tools, {whole} tokens whole, {visible} visible")  # noqa: T201  # the measurement, with pytest -rP
    assert whole <= MAX_TOKENS
    assert visible <= MAX_VISIBLE_TOKENS
