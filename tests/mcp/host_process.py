"""`tinker-mcp serve` as a host holds it: a process, its pipes, and the ways it can end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

START_BOUND_S = 60.0
END_BOUND_S = 10.0
HELLO = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "0"},
}
# A parent that starts the server on its own streams, which the test keeps open beyond its death.
_PARENT = "import subprocess, sys; subprocess.run(sys.argv[1:])"
SERVE = [sys.executable, "-m", "tinker_mcp", "serve"]


@dataclass
class Hosted:
    """A server that has answered `initialize`.

    Attributes:
        parent: What the test started: the server itself, or the server's parent.
        server: The process that speaks MCP.
    """

    parent: subprocess.Popen[bytes]
    server: psutil.Process
    log: Path
    _numbers: int = 1

    def ask(self, tool: str, **arguments: Any) -> None:
        """Call a tool without waiting for its reply."""
        self._numbers += 1
        params = {"name": tool, "arguments": arguments}
        _send(self.parent, id=self._numbers, method="tools/call", params=params)

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool; the result."""
        self.ask(tool, **arguments)
        result: dict[str, Any] = _answer(self.parent, self._numbers)["result"]
        return result

    def start_run(self, **arguments: Any) -> list[dict[str, Any]]:
        """Call start_run until it has finished; all of its replies, none of them an error."""
        replies: list[dict[str, Any]] = []
        deadline = time.monotonic() + START_BOUND_S
        while not (replies and replies[-1]["finished"]):
            assert time.monotonic() < deadline, replies[-1]
            result = self.call("start_run", **arguments)
            assert not result.get("isError"), result
            replies.append(result["structuredContent"])
        return replies

    def end(self, way: str) -> None:
        """End it in one of the WAYS; returns at once."""
        WAYS[way](self)

    def wait(self) -> int:
        """Wait until the server is gone; the exit status of what the test started."""
        try:
            status = self.parent.wait(END_BOUND_S)  # first: psutil would take the status away
            self.server.wait(END_BOUND_S)
        finally:
            for pipe in (self.parent.stdin, self.parent.stdout):
                _pipe(pipe).close()
            for process in (self.parent, self.server):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        return status


WAYS: dict[str, Callable[[Hosted], None]] = {
    "SIGKILL": lambda hosted: hosted.server.kill(),
    "SIGTERM": lambda hosted: hosted.server.terminate(),
    "SIGINT": lambda hosted: hosted.server.send_signal(signal.SIGINT),
    "EOF": lambda hosted: _pipe(hosted.parent.stdin).close(),
    "death of the parent": lambda hosted: hosted.parent.kill(),
}


def start(home: Path, log: Path, *, way: str = "EOF", **env: str) -> Hosted:
    """Start a server that is to end in `way`; it has a parent of its own where that shall die."""
    command = [sys.executable, "-c", _PARENT, *SERVE] if way == "death of the parent" else SERVE
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "TINKER_MCP_HOME": str(home), **env},
        )
    _send(process, id=1, method="initialize", params=HELLO)
    _answer(process, 1)
    _send(process, method="notifications/initialized")
    this = psutil.Process(process.pid)
    server = this if command is SERVE else this.children()[0]
    return Hosted(process, server, log)


def _send(process: subprocess.Popen[bytes], **message: Any) -> None:
    pipe = _pipe(process.stdin)
    pipe.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    pipe.flush()


def _answer(process: subprocess.Popen[bytes], number: int) -> dict[str, Any]:
    while True:
        readable = select.select([_pipe(process.stdout)], [], [], START_BOUND_S)[0]
        line = _pipe(process.stdout).readline() if readable else b""
        assert line, "no answer"
        message: dict[str, Any] = json.loads(line)
        if message.get("id") == number:
            return message


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
