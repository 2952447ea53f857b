"""What hosts are told of each tool, a file each; `python -m tests.schema_snapshots` renews them.

A change of a name, a description, an annotation or a schema then shows as a change of a file.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from mcp.client import Client

from tinker_mcp.server import create_server
from tinker_mcp.settings import Settings

SNAPSHOTS = Path(__file__).parent / "mcp" / "snapshots"
KEYS = ("name", "title", "description", "annotations", "inputSchema", "outputSchema")


async def tools() -> dict[str, dict[str, Any]]:
    """Each tool as `tools/list` tells of it."""
    async with Client(create_server(Settings())) as client:
        listed = (await client.list_tools()).tools
    told = [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in listed]
    return {tool["name"]: tool for tool in told}


def snapshot(tool: dict[str, Any]) -> str:
    """The text of a tool's file."""
    return json.dumps({key: tool.get(key) for key in KEYS}, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    told = asyncio.run(tools())
    SNAPSHOTS.mkdir(exist_ok=True)
    for path in SNAPSHOTS.glob("*.json"):
        if path.stem not in told:
            path.unlink()
    for name, tool in told.items():
        (SNAPSHOTS / f"{name}.json").write_text(snapshot(tool))


if __name__ == "__main__":
    main()
