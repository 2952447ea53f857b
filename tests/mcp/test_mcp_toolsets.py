"""Which tools are offered is the user's choice: --toolsets and --read-only."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from mcp.client import Client

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.server import create_server
from tinker_mcp.server.app import INSTRUCTIONS, TOOLS, offered
from tinker_mcp.settings import TOOLSETS, LogSettings, Settings


def names(**environ: str) -> list[str]:
    return [spec.fn.__name__ for spec in offered(Settings.from_environment(environ))]


def test_every_tool_belongs_to_a_toolset_and_every_toolset_has_tools() -> None:
    assert {spec.toolset for spec in TOOLS} == set(TOOLSETS)


def test_all_tools_are_offered_by_default() -> None:
    assert names() == [spec.fn.__name__ for spec in TOOLS]


def test_a_toolset_selects_its_group() -> None:
    chosen = names(TINKER_MCP_TOOLSETS="setup, sampling")
    assert chosen[:3] == ["check_setup", "list_models", "search_docs"]
    assert "sample" in chosen
    assert "train" not in chosen


def test_read_only_leaves_out_all_that_changes_or_spends() -> None:
    chosen = names(TINKER_MCP_READ_ONLY="true")
    assert {"check_setup", "list_models", "search_docs", "list_checkpoints"} <= set(chosen)
    spending = {"sample", "train", "build_datums", "save_checkpoint", "forward_backward"}
    assert not spending & set(chosen)


def test_the_option_comes_before_the_variable() -> None:
    environ = {"TINKER_MCP_TOOLSETS": "data"}
    settings = Settings.from_environment(environ, toolsets="setup", read_only=True)
    assert settings.toolsets == {"setup"}
    assert settings.read_only


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"TINKER_MCP_TOOLSETS": "setup,kitchen"}, "Unknown toolset kitchen. Use some of: setup"),
        ({"TINKER_MCP_READ_ONLY": "perhaps"}, "TINKER_MCP_READ_ONLY='perhaps' is unclear."),
    ],
)
def test_an_unknown_choice_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        Settings.from_environment(environ)


async def test_hosts_are_told_who_this_is() -> None:
    async with Client(create_server(Settings())) as client:
        info = client.server_info
        lists = [await client.list_tools(), await client.list_prompts()]
    assert info.title
    assert info.website_url
    assert info.icons
    assert info.icons[0].src.startswith("data:image/svg+xml,")
    assert len(INSTRUCTIONS.encode()) < 2048
    assert "group" in INSTRUCTIONS
    assert {(found.ttl_ms, found.cache_scope) for found in lists} == {(3_600_000, "public")}


def test_the_log_is_json_on_stderr_where_that_is_asked() -> None:
    script = (
        "import logging, os, structlog\n"
        "from tinker_mcp.cli import _log_to_stderr\n"
        "from tinker_mcp.settings import LogSettings\n"
        "_log_to_stderr(LogSettings.from_environment(os.environ))\n"
        "log = structlog.get_logger()\n"
        "log.info('hidden')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    log.exception('ours', number=1)\n"
        "logging.getLogger('lib').warning('theirs')\n"
    )
    environ = {"TINKER_MCP_LOG_FORMAT": "json", "TINKER_MCP_LOG_LEVEL": "warning"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.stdout == ""
    assert [(line["event"], line["level"]) for line in lines] == [
        ("ours", "error"),
        ("theirs", "warning"),
    ]
    assert "ZeroDivisionError" in lines[0]["exception"]


@pytest.mark.parametrize("name", ["TINKER_MCP_LOG_FORMAT", "TINKER_MCP_LOG_LEVEL"])
def test_an_unknown_way_to_log_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{name}='loud' is unknown"):
        LogSettings.from_environment({name: "loud"})
