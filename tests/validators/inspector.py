"""The Inspector's strict look at the list of tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.validators import node
from tests.validators.serving import AUTHORIZATION, STDIO, http_process

LIST = ["--method", "tools/list", "--strict"]


@dataclass(frozen=True)
class Inspection:
    """How it ended.

    Attributes:
        summary: Its last line, or what went wrong.
    """

    transport: str
    status: int
    tools: int
    summary: str


def inspect_stdio(folder: Path) -> Inspection:
    """Look at a server that the Inspector starts itself."""
    return _inspect("stdio", [*STDIO], folder)


def inspect_http(folder: Path) -> Inspection:
    """Look at `tinker-mcp serve --http`, with its token."""
    with http_process(folder) as url:
        shown = ["--header", f"Authorization: {AUTHORIZATION}"]
        return _inspect("http", [url, "--transport", "http", *shown], folder)


def _inspect(transport: str, target: list[str], folder: Path) -> Inspection:
    env = {"TINKER_MCP_HOME": str(folder), "MCP_CATALOG_PATH": str(folder / "catalog.json")}
    run = node.run("mcp-inspector", ["--cli", *target, *LIST], env)
    try:
        tools = len(json.loads(run.stdout)["tools"])
    except (ValueError, KeyError):
        tools = 0
    said = run.stderr.strip().splitlines() or [""]
    return Inspection(transport, run.returncode, tools, said[-1])
