"""The bundle's manifest names each tool and prompt: `python -m tests.hosts.manifests` renews it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from mcp.client import Client

from tinker_mcp import __version__
from tinker_mcp.server import create_server
from tinker_mcp.settings import Settings

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "manifest.json"


async def offered() -> dict[str, Any]:
    """The manifest's `tools` and `prompts`, as the server tells of them.

    A prompt's text is its description: the server fills the real one in.
    """
    async with Client(create_server(Settings())) as client:
        tools = (await client.list_tools()).tools
        prompts = (await client.list_prompts()).prompts
    return {
        "tools": [
            {"name": tool.name, "description": _first_sentence(tool.description)} for tool in tools
        ],
        "prompts": [
            {
                "name": prompt.name,
                "description": prompt.description,
                "arguments": [argument.name for argument in prompt.arguments or ()],
                "text": prompt.description,
            }
            for prompt in prompts
        ],
        "prompts_generated": True,
    }


def renewed(manifest: str) -> str:
    """The manifest with the version, the tools and the prompts of now."""
    fields = {**json.loads(manifest), "version": __version__, **asyncio.run(offered())}
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _first_sentence(description: str | None) -> str:
    return (description or "").split("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    BUNDLE.write_text(renewed(BUNDLE.read_text()))
