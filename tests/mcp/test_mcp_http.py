"""The server over HTTP: nothing without the token, nothing under a foreign name."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import httpx2
import psutil
import pytest
from host_process import END_BOUND_S, HELLO, SERVE, START_BOUND_S
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client

from tinker_mcp.server.http import Address

TOKEN = "a-token-that-is-long-enough"
INITIALIZE = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": HELLO}
ACCEPT = {"Accept": "application/json, text/event-stream"}


@dataclass
class OverHttp:
    """A server that listens: its ready line, and its process."""

    ready: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return self.ready["url"]

    @property
    def root(self) -> str:
        return self.url.removesuffix("/mcp")

    def post(self, token: str | None = TOKEN, **headers: str) -> httpx.Response:
        """Send `initialize`."""
        shown = {} if token is None else {"Authorization": f"Bearer {token}"}
        everything = {**ACCEPT, **shown, **headers}
        return httpx.post(self.url, json=INITIALIZE, headers=everything, trust_env=False)


def start(home: Path, *arguments: str, **env: str) -> OverHttp:
    log = home.with_name("http.log")
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            [*SERVE, "--http", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "TINKER_MCP_HOME": str(home), **env},
        )
    assert process.stdout is not None
    readable = select.select([process.stdout], [], [], START_BOUND_S)[0]
    line = process.stdout.readline() if readable else b""
    assert line, log.read_text()
    return OverHttp(json.loads(line), process, log)


def stop(server: OverHttp, number: int = signal.SIGTERM) -> int:
    server.process.send_signal(number)
    try:
        return server.process.wait(END_BOUND_S)
    finally:
        server.process.kill()
        server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OverHttp]:
    """A server whose token is TOKEN."""
    started = start(tmp_path_factory.mktemp("http") / "home", TINKER_MCP_TOKEN=TOKEN)
    yield started
    stop(started)


@pytest.fixture
def free_home(tmp_path: Path) -> Path:
    return tmp_path / "home"


async def test_an_agent_with_the_token_calls_tools(server: OverHttp) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        httpx2.AsyncClient(headers=headers, trust_env=False) as http,
        Client(streamable_http_client(server.url, http_client=http)) as client,
    ):
        names = [tool.name for tool in (await client.list_tools()).tools]
        reply = await client.call_tool("check_setup", {})
    assert "create_training_client" in names
    assert not reply.is_error


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "PUT", "HEAD"])
@pytest.mark.parametrize("path", ["/mcp", "/", "/.well-known/oauth-protected-resource"])
def test_without_the_token_every_request_gets_the_same_answer(
    server: OverHttp, method: str, path: str
) -> None:
    answer = httpx.request(method, server.root + path, content=b"{", trust_env=False)
    headers = {name: value for name, value in answer.headers.items() if name != "date"}
    assert (answer.status_code, answer.content) == (401, b"")
    assert headers == {"www-authenticate": "Bearer", "content-length": "0"}


@pytest.mark.parametrize(
    "shown",
    [f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", f"Basic {TOKEN}", TOKEN],
)
def test_a_wrong_token_is_as_good_as_none(server: OverHttp, shown: str) -> None:
    answer = server.post(None, Authorization=shown)
    assert (answer.status_code, answer.content) == (401, b"")


def test_the_scheme_is_written_as_one_likes(server: OverHttp) -> None:
    assert server.post(None, Authorization=f"bearer {TOKEN}").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:80"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:6274"}, 200),
        ({"Host": "localhost:1234"}, 200),
    ],
)
def test_a_page_that_renames_this_machine_is_refused(
    server: OverHttp, headers: dict[str, str], status: int
) -> None:
    assert server.post(**headers).status_code == status


def test_a_token_is_made_where_none_is_set_and_said_once(free_home: Path) -> None:
    server = start(free_home)
    try:
        token = server.ready["token"]
        assert len(token) >= 40
        assert server.post(token).status_code == 200
        assert server.post().status_code == 401
    finally:
        stop(server)
    assert token not in server.log.read_text()


def test_a_token_that_was_given_is_not_said(server: OverHttp) -> None:
    assert set(server.ready) == {"url", "pid"}
    assert TOKEN not in server.log.read_text()
    assert TOKEN not in " ".join(psutil.Process(server.process.pid).cmdline())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_while_a_client_listens(number: signal.Signals, free_home: Path) -> None:
    server = start(free_home, TINKER_MCP_TOKEN=TOKEN)
    session = {"mcp-session-id": server.post().headers["mcp-session-id"]}
    headers = {**ACCEPT, **session, "Authorization": f"Bearer {TOKEN}"}
    with httpx.stream("GET", server.url, headers=headers, trust_env=False) as stream:
        assert stream.status_code == 200
        assert stop(server, number) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["--host", "0.0.0.0"], {}, "Set TINKER_MCP_TOKEN"),  # noqa: S104 - it is refused
        (["--host", "192.0.2.1"], {"TINKER_MCP_TOKEN": TOKEN}, "Cannot listen on 192.0.2.1:0"),
        ([], {"TINKER_MCP_TOKEN": "short"}, "16 or more visible ASCII"),
    ],
)
def test_an_address_or_a_token_that_cannot_be_used_ends_it_with_a_sentence(
    free_home: Path, arguments: list[str], env: dict[str, str], said: str
) -> None:
    done = subprocess.run(
        [*SERVE, "--http", *arguments],
        env={**os.environ, "TINKER_MCP_HOME": str(free_home), **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_everywhere_means_also_by_name_with_a_token(free_home: Path) -> None:
    everywhere = ["--host", "0.0.0.0", "--allowed-host", "gpu.example"]  # noqa: S104
    server = start(free_home, *everywhere, TINKER_MCP_TOKEN=TOKEN)
    try:
        port = urlsplit(server.url).port
        loopback = OverHttp({"url": f"http://127.0.0.1:{port}/mcp"}, server.process, server.log)
        assert loopback.post().status_code == 200
        assert loopback.post(Host=f"gpu.example:{port}").status_code == 200
        assert loopback.post(Host=f"other.example:{port}").status_code == 421
        assert loopback.post(None).status_code == 401
    finally:
        stop(server)


def test_an_address_knows_its_names() -> None:
    assert Address().allowed_hosts == ["127.0.0.1", "localhost", "[::1]"]
    assert "[2001:db8::1]" in Address("2001:db8::1").allowed_hosts
