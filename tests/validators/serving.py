"""The server as the validators reach it: over HTTP on a free port of this machine."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from mcp.server.mcpserver import MCPServer

from tinker_mcp.server.http import PATH, BearerGuard, create_app

TOKEN = "a-token-for-the-validators"
AUTHORIZATION = f"Bearer {TOKEN}"
STDIO = [sys.executable, "-m", "tinker_mcp", "serve"]
START_BOUND_S = 60.0
STOP_BOUND_S = 10.0


class WithToken:
    """Shows the token for a tool that cannot send headers of its own."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            shown = (b"authorization", AUTHORIZATION.encode())
            scope = {**scope, "headers": [*scope["headers"], shown]}
        await self._app(scope, receive, send)


@contextmanager
def serving(server: MCPServer[Any]) -> Iterator[str]:
    """The URL of `server` behind its own guard, in a thread of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = WithToken(BearerGuard(create_app(server), TOKEN))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1
    )
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        # localhost: the suite tests DNS rebinding with the name it is given.
        yield f"http://localhost:{listener.getsockname()[1]}{PATH}"
    finally:
        web.should_exit = True
        thread.join(STOP_BOUND_S)


@contextmanager
def http_process(home: Path) -> Iterator[str]:
    """The URL of `tinker-mcp serve --http` as a user starts it; it wants AUTHORIZATION."""
    with (home / "stderr.log").open("w") as log:
        process = subprocess.Popen(
            [*STDIO, "--http"],
            env={**os.environ, "TINKER_MCP_HOME": str(home), "TINKER_MCP_TOKEN": TOKEN},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdout is not None
    try:
        readable = select.select([process.stdout], [], [], START_BOUND_S)[0]
        line = process.stdout.readline() if readable else b""
        assert line, (home / "stderr.log").read_text()
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait(STOP_BOUND_S)
        process.stdout.close()
