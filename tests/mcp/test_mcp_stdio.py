"""The server as a host starts it: a process that speaks MCP over its standard streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from agents import over_stdio
from test_mcp_stories import whole_slice

HEAVY = ["tinker", "torch", "transformers", "tinker_cookbook"]


async def test_the_whole_slice_over_stdio_and_the_process_ends_with_its_client(
    home: Path, tmp_path: Path
) -> None:
    log = tmp_path / "stderr.log"
    with log.open("w") as errlog:
        before = set(psutil.Process().children())
        async with over_stdio(home, errlog) as agent:
            (server,) = set(psutil.Process().children()) - before
            await whole_slice(agent)
    _, alive = psutil.wait_procs([server], timeout=5)
    assert alive == []
    assert "Traceback" not in log.read_text()


def test_listing_the_tools_loads_nothing_heavy() -> None:
    script = f"""
import anyio, json, sys
from mcp.client import Client
from tinker_mcp.server import create_server
from tinker_mcp.settings import Settings

async def main():
    async with Client(create_server(Settings())) as client:
        await client.list_tools()
    print(json.dumps([name for name in {HEAVY} if name in sys.modules]))

anyio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == []


def test_stdout_carries_the_protocol_alone_and_initialize_loads_nothing_heavy(
    tmp_path: Path,
) -> None:
    hello = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "test", "version": "0"},
        },
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tinker_mcp", "serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TINKER_MCP_HOME": str(tmp_path)},
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(hello).encode() + b"\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        loaded = {Path(mapped.path).name for mapped in psutil.Process(process.pid).memory_maps()}
        process.stdin.close()
        began = time.monotonic()
        rest = process.stdout.read()
        status = process.wait(10)
    assert (answer["id"], answer["result"]["serverInfo"]["name"]) == (1, "tinker-mcp")
    assert not any("torch" in library for library in loaded)
    assert (rest, status) == (b"", 0)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("variable", ["TINKER_MCP_BACKEND", "TINKER_BASE_URL"])
def test_a_setting_that_cannot_be_used_ends_the_server_with_a_sentence(variable: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tinker_mcp", "serve"],
        env={**os.environ, variable: "bogus"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert "'bogus'" in done.stderr
    assert "Traceback" not in done.stderr
