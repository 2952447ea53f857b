"""What a coding agent does: call tools, read replies."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from tinker_mcp.server import create_server
from tinker_mcp.settings import Settings

TINY = "tinker-local/tiny"
_BOUND_S = 120
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {word}."},
            {"role": "assistant", "content": f"{word}!"},
        ]
    }
    for word in ("red", "green", "blue", "black", "white", "pink", "gold", "grey")
]


@dataclass
class Agent:
    """Calls tools and keeps every reply's text."""

    client: Client
    texts: list[str] = field(default_factory=list)

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """A call that must succeed; its structured content."""
        reply = await self.client.call_tool(tool, arguments)
        self.texts.append(getattr(reply.content[0], "text", ""))
        assert not reply.is_error, self.texts[-1]
        assert reply.structured_content is not None
        return dict(reply.structured_content)

    async def error(self, tool: str, **arguments: Any) -> str:
        """A call that must fail; what it says."""
        reply = await self.client.call_tool(tool, arguments)
        self.texts.append(getattr(reply.content[0], "text", ""))
        assert reply.is_error, self.texts[-1]
        return self.texts[-1]

    async def start_run(self, **arguments: Any) -> dict[str, Any]:
        """A run that is started, by as many calls as that takes."""
        async with asyncio.timeout(_BOUND_S):
            while not (started := await self.call("start_run", **arguments))["finished"]:
                pass
        return started

    async def refused_run(self, **arguments: Any) -> str:
        """What stands in the way of a run, by as many calls as it takes to be found."""
        async with asyncio.timeout(_BOUND_S):
            while not (reply := await self.client.call_tool("start_run", arguments)).is_error:
                assert (reply.structured_content or {})["finished"] is False
        self.texts.append(getattr(reply.content[0], "text", ""))
        return self.texts[-1]

    async def new_client(self, **arguments: Any) -> str:
        opened = await self.call(
            "create_training_client", **{"base_model": TINY, "rank": 4, "seed": 0, **arguments}
        )
        return str(opened["client_id"])

    async def new_data(self, **arguments: Any) -> dict[str, Any]:
        return await self.call(
            "build_datums", **{"base_model": TINY, "conversations": CONVERSATIONS, **arguments}
        )

    async def train(self, client_id: str, data_id: str, **arguments: Any) -> dict[str, Any]:
        asked = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, **arguments}
        return await self.call("train", client_id=client_id, data_id=data_id, **asked)

    async def loss(self, client_id: str, data_id: str) -> float:
        scored = await self.call(
            "forward_backward", client_id=client_id, data_id=data_id, forward_only=True
        )
        return float(scored["loss"])

    async def text(self, **arguments: Any) -> str:
        """What a model says to a fixed prompt, greedily."""
        asked = {"prompt": "Say red.", "temperature": 0, "max_tokens": 12, **arguments}
        return str((await self.call("sample", **asked))["samples"][0]["text"])


@asynccontextmanager
async def in_memory(settings: Settings) -> AsyncIterator[Agent]:
    """An agent on a server in this process."""
    async with Client(create_server(settings)) as client:
        yield Agent(client)


@asynccontextmanager
async def over_stdio(home: Path, errlog: TextIO = sys.stderr, **env: str) -> AsyncIterator[Agent]:
    """An agent on a server process."""
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-m", "tinker_mcp", "serve"],
        env={**os.environ, "TINKER_MCP_HOME": str(home), **env},
    )
    async with Client(stdio_client(parameters, errlog=errlog)) as client:
        yield Agent(client)
