"""Keys and tokens are in no reply, log, file or process list."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from agents import TINY, Agent, over_stdio
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from test_mcp_http import OverHttp, start, stop

from servers import LocalServer
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.settings import Settings
from tinker_mcp.training.backend import Backend

TOKEN = "token-that-must-not-be-seen"
WRONG_KEY = "tml-key-that-must-not-be-seen"


@contextmanager
def serving(home: Path, **env: str) -> Iterator[OverHttp]:
    server = start(home, TINKER_MCP_TOKEN=TOKEN, TINKER_MCP_LOG_LEVEL="debug", **env)
    try:
        yield server
    finally:
        stop(server)


async def session(url: str) -> list[str]:
    """Do a bit of everything, whether it works or not; all that the server said."""
    said = []
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        httpx2.AsyncClient(headers=headers, trust_env=False, timeout=120) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):

        async def call(tool: str, **arguments: Any) -> dict[str, Any]:
            reply = await client.call_tool(tool, arguments)
            said.append(reply.model_dump_json())
            return dict(reply.structured_content or {})

        await call("check_setup")
        await call("list_models")
        conversation = [{"messages": [{"role": "user", "content": "Hi"}]}]
        conversation[0]["messages"].append({"role": "assistant", "content": "Ho"})
        data = await call("build_datums", base_model=TINY, conversations=conversation)
        opened = await call("create_training_client", base_model=TINY, rank=2, seed=0)
        on = {"client_id": opened.get("client_id", "client-1")}
        await call("forward_backward", data_id=data.get("data_id", "data-1"), **on)
        await call("optim_step", learning_rate=1e-3, **on)
        await call("sample", prompt="Hi", max_tokens=2, **on)
        await call("save_checkpoint", name="kept", **on)
        await call("list_checkpoints")
        await call("check_setup", unknown=True)
    return said


def places(server: OverHttp, said: list[str]) -> Iterator[tuple[str, bytes]]:
    """Where a secret could show, and what is there."""
    for number, text in enumerate(said):
        yield f"reply {number}", text.encode()
    yield "stdout", json.dumps(server.ready).encode()
    yield "stderr", server.log.read_bytes()
    for file in _files(server.log.parent):
        yield str(file), file.read_bytes()
    for process in psutil.process_iter():
        try:
            yield f"process {process.pid}", " ".join(process.cmdline()).encode()
        except psutil.Error:  # gone meanwhile
            continue


@pytest.mark.parametrize("has_right_key", [True, False])
async def test_no_secret_of_a_hosted_session_is_seen_anywhere(
    has_right_key: bool, home_server: LocalServer, tmp_path: Path
) -> None:
    key = home_server.api_key if has_right_key else WRONG_KEY
    with serving(tmp_path / "home", **{**home_server.env, "TINKER_API_KEY": key}) as server:
        said = await session(server.url)
        seen = [
            (place, secret)
            for place, content in places(server, said)
            for secret in (key, TOKEN)
            if secret.encode() in content
        ]
    assert seen == []
    assert ('is_error":true' in said[1]) is not has_right_key


async def test_the_local_backends_key_lies_in_one_file_for_its_owner_alone(
    own_home: Path, tmp_path: Path
) -> None:
    with (tmp_path / "stderr.log").open("w") as log:
        async with over_stdio(
            own_home, log, TINKER_API_KEY=WRONG_KEY, TINKER_MCP_BACKEND="local"
        ) as agent:
            await _train_a_little(agent)
            note = own_home / "local" / "server.json"
            key = json.loads(note.read_text())["api_key"]
            with_key = [file for file in _files(own_home) if key.encode() in file.read_bytes()]
            environ = psutil.Process(json.loads(note.read_text())["pid"]).environ()
            mode = stat.S_IMODE(note.stat().st_mode)
            said = " ".join(agent.texts)
    assert (with_key, mode) == ([note], 0o600)
    assert WRONG_KEY not in environ.values()
    for text in (said, (tmp_path / "stderr.log").read_text()):
        assert key not in text
        assert WRONG_KEY not in text


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


async def _train_a_little(agent: Agent) -> None:
    data_id = (await agent.new_data())["data_id"]
    client_id = await agent.new_client()
    await agent.train(client_id, data_id, steps=1)


def test_an_address_is_shown_without_its_password() -> None:
    backend = Backend("hosted", "https://me:hidden@tinker.example:8443/x?sig=hidden", "tml-hidden")
    settings = Settings(base_url=backend.base_url, api_key="tml-hidden", http_token="hidden")
    assert backend.label == "hosted (tinker.example:8443)"
    assert "hidden" not in f"{backend!r} {settings!r}"
    with pytest.raises(InvalidInputError) as refused:
        Settings.from_environment({"TINKER_BASE_URL": "me:hidden@host?sig=hidden"})
    assert "hidden" not in str(refused.value)
