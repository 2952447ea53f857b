"""The fixtures themselves, where the suite would show a mistake as a rare timeout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.validators.fixtures import mount
from tests.validators.serving import serving
from tinker_mcp.server import create_server
from tinker_mcp.settings import Settings

ACCEPT = {"accept": "application/json, text/event-stream"}
VERSION = "2025-11-25"


def message(method: str, params: dict[str, Any], id_: int) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id_, "method": method, "params": params}


# Sampling is deprecated in 2026-07-28; the suite tests the revision before.
@pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning")
def test_a_client_without_a_stream_of_its_own_is_asked_on_that_of_its_call(tmp_path: Path) -> None:
    server = create_server(Settings(home=tmp_path, roots=(tmp_path,)))
    mount(server)
    with serving(server) as url, httpx.Client(headers=ACCEPT, timeout=10) as client:
        able = {"capabilities": {"sampling": {}}, "clientInfo": {"name": "test", "version": "1"}}
        opened = client.post(
            url, json=message("initialize", {"protocolVersion": VERSION, **able}, 1)
        )
        client.headers["mcp-session-id"] = opened.headers["mcp-session-id"]
        client.headers["mcp-protocol-version"] = VERSION
        client.post(url, json={"jsonrpc": "2.0", "method": "notifications/initialized"})
        call = {"name": "test_sampling", "arguments": {"prompt": "Hello"}}
        with client.stream("POST", url, json=message("tools/call", call, 2)) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
            question = json.loads(next(lines).removeprefix("data: "))
            said = {"role": "assistant", "content": {"type": "text", "text": "Hi"}, "model": "m"}
            client.post(url, json={"jsonrpc": "2.0", "id": question["id"], "result": said})
            answer = json.loads(next(lines).removeprefix("data: "))
    assert question["method"] == "sampling/createMessage"
    assert answer["result"]["content"][0]["text"] == "LLM response: Hi"
