"""The Inspector's strict look at the list of tools, and its check of the skill's digests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.validators import node
from tests.validators.serving import AUTHORIZATION, STDIO, http_process

CHECKS = {
    "tools/list --strict": ["--method", "tools/list", "--strict"],
    # The extension is of revision 2026-07-28: to an older client the Inspector does not show it.
    "skills/list --verify": [
        *("--method", "skills/list", "--verify", "--require-digests"),
        *("--protocol-era", "modern"),
    ],
}
# What of its report is counted: the tools, or the files of the one skill
_COUNTED = {"tools/list --strict": "tools", "skills/list --verify": "files"}


@dataclass(frozen=True)
class Inspection:
    """How a check ended.

    Attributes:
        found: The tools that were listed, or the skill's files that were read.
        summary: Its last line, or what went wrong.
    """

    check: str
    transport: str
    status: int
    found: int
    summary: str


def inspect_stdio(folder: Path) -> list[Inspection]:
    """Look at a server that the Inspector starts itself."""
    return [_inspect(check, "stdio", [*STDIO], folder) for check in CHECKS]


def inspect_http(folder: Path) -> list[Inspection]:
    """Look at `tinker-mcp serve --http`, with its token."""
    with http_process(folder) as url:
        target = [url, "--transport", "http", "--header", f"Authorization: {AUTHORIZATION}"]
        return [_inspect(check, "http", target, folder) for check in CHECKS]


def _inspect(check: str, transport: str, target: list[str], folder: Path) -> Inspection:
    env = {"TINKER_MCP_HOME": str(folder), "MCP_CATALOG_PATH": str(folder / "catalog.json")}
    run = node.run("mcp-inspector", ["--cli", *target, *CHECKS[check]], env)
    try:
        found = len(json.loads(run.stdout)[_COUNTED[check]])
    except (ValueError, KeyError):
        found = 0
    said = (run.stderr or run.stdout).strip().splitlines() or [""]
    return Inspection(check, transport, run.returncode, found, said[-1])
