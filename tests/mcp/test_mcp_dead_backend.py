"""A backend that dies, refuses or cannot start is reported within seconds, with the way on."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import tinker
from agents import TINY, in_memory, over_stdio

from servers import LocalServer, backends_of, start_server
from tinker_mcp.errors import ClientLostError, RequestFailedError, TinkerMcpError
from tinker_mcp.settings import Settings
from tinker_mcp.training import proxies, sdk_errors, sdk_logs
from tinker_mcp.training.sessions import let_go


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def test_a_backend_killed_while_it_trains_is_reported_and_the_checkpoint_goes_on(
    own_home: Path,
) -> None:
    server = start_server(own_home / "local")
    async with in_memory(Settings(home=own_home)) as agent:
        data = await agent.new_data(eval_share=0.25)
        client_id = await agent.new_client()
        await agent.train(client_id, data["data_id"], steps=3)
        saved = await agent.call("save_checkpoint", client_id=client_id, name="kept")
        before = await agent.loss(client_id, data["eval_data_id"])

        progressing = asyncio.Event()

        async def note(*_: Any) -> None:
            progressing.set()

        long = asyncio.create_task(
            agent.client.call_tool(
                "train",
                {
                    "client_id": client_id,
                    "data_id": data["data_id"],
                    "steps": 100_000,
                    "batch_size": 2,
                    "learning_rate": 1e-3,
                },
                progress_callback=note,
            )
        )
        await asyncio.wait_for(progressing.wait(), 30)
        server.kill()
        began = time.monotonic()
        reply = await asyncio.wait_for(long, 15)
        assert reply.is_error
        assert time.monotonic() - began < 15
        said = getattr(reply.content[0], "text", "")
        assert said.startswith("client_lost: ")
        assert f'create_training_client(checkpoint="{saved["state"]}")' in said

        between = await agent.error("optim_step", client_id=client_id, learning_rate=1e-3)
        assert between.startswith("client_lost: ")
        assert f'create_training_client(checkpoint="{saved["state"]}")' in between

        again = await agent.call("create_training_client", checkpoint=saved["state"])
        assert again["client_id"] != client_id
        assert await agent.loss(again["client_id"], data["eval_data_id"]) == before


async def test_a_client_without_a_checkpoint_says_that_its_steps_are_gone(own_home: Path) -> None:
    server = start_server(own_home / "local")
    async with in_memory(Settings(home=own_home)) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        await agent.train(client_id, data_id, steps=3)
        server.kill()
        said = await agent.error("optim_step", client_id=client_id, learning_rate=1e-3)
    assert "had no checkpoint, so its 3 steps are gone" in said
    assert "create_training_client" in said


async def test_a_backend_that_is_silent_is_reported_at_once_and_its_clients_are_kept(
    own_home: Path,
) -> None:
    server = start_server(own_home / "local")
    async with in_memory(Settings(home=own_home)) as agent:
        data_id = (await agent.new_data())["data_id"]
        on = {"client_id": await agent.new_client(), "data_id": data_id}
        began = time.monotonic()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            said = [await agent.error("list_models"), await agent.error("forward_backward", **on)]
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert time.monotonic() - began < 10
        for error in said:
            assert error.startswith("backend_unreachable: ")
            assert f"end its process {server.pid}" in error
        assert (await agent.call("forward_backward", **on))["finished"]
    server.stop()


async def test_a_bad_question_is_refused_before_weights_are_saved(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        nothing_said = [{"role": "user"}]
        error = await agent.error("sample", client_id=client_id, messages=nothing_said)
    assert 'refuses these messages: messages[0]: not an object with "role" and "content"' in error


async def test_two_servers_that_start_the_backend_at_once_share_one(own_home: Path) -> None:
    async with over_stdio(own_home) as one, over_stdio(own_home) as two:
        replies = await asyncio.gather(one.call("list_models"), two.call("list_models"))
        assert len(backends_of(own_home)) == 1
    assert replies[0]["backend"] == replies[1]["backend"]


async def test_a_backend_that_cannot_start_gives_its_reason(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_LOCAL_MODELS", "/no/such/model")
    async with in_memory(Settings(home=own_home)) as agent:
        said = await agent.error("list_models")
    assert said.startswith("backend_unreachable: The local backend could not start: ")
    assert "/no/such/model" in said


async def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.write_text("no folder")
    async with in_memory(Settings(home=home)) as agent:
        said = await agent.error("list_models")
    assert str(home) in said
    assert "TINKER_MCP_HOME" in said


async def test_a_note_that_makes_no_sense_is_as_good_as_none(own_home: Path) -> None:
    (own_home / "local").mkdir(parents=True)
    (own_home / "local" / "server.json").write_text("[]")
    async with in_memory(Settings(home=own_home)) as agent:
        setup = await agent.call("check_setup")
    assert setup["backend_state"] == "not running; starts when it is first needed"


async def test_hosted_without_a_key_says_how_to_go_on() -> None:
    async with in_memory(Settings(backend="hosted")) as agent:
        said = await agent.error("list_models")
        setup = await agent.call("check_setup")
    assert "TINKER_API_KEY is not set" in said
    assert "--backend local" in said
    assert setup["problems"][0]["problem"] == "TINKER_API_KEY is not set."


async def test_an_address_that_refuses_connections_is_reported_in_seconds(free_port: int) -> None:
    hosted = Settings(base_url=f"http://127.0.0.1:{free_port}", api_key="tml-x")
    async with in_memory(hosted) as agent:
        began = time.monotonic()
        said = await agent.error("list_models")
        setup = await agent.call("check_setup")
        assert time.monotonic() - began < 3
    assert said.startswith(f"backend_unreachable: The backend hosted (127.0.0.1:{free_port})")
    assert setup["backend_state"] == "unreachable"


@pytest.mark.parametrize("key", ["tml-wrong", "wrong"])
async def test_a_wrong_key_is_told_as_such(home_server: LocalServer, key: str) -> None:
    async with in_memory(Settings(base_url=home_server.base_url, api_key=key)) as agent:
        began = time.monotonic()
        said = await agent.error("list_models")
        opened = await agent.error("create_training_client", base_model=TINY)
        setup = await agent.call("check_setup")
        assert time.monotonic() - began < 10
    assert [("key" in text.lower(), key in text) for text in (said, opened)] == [(True, False)] * 2
    assert "the API key was refused" in setup["problems"][0]["problem"]


async def test_with_the_right_key_everything_works_as_hosted(
    home_server: LocalServer, tmp_path: Path
) -> None:
    async with over_stdio(tmp_path / "home", **home_server.env) as agent:
        data = await agent.new_data()
        client_id = await agent.new_client()
        trained = await agent.train(client_id, data["data_id"])
        await agent.text(client_id=client_id)
    assert trained["backend"] == f"hosted (127.0.0.1:{home_server.port})"
    assert not (tmp_path / "home").exists()


def test_the_server_is_gone_when_its_input_ends(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tinker_mcp", "serve"],
        input=b"",
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert (process.returncode, process.stdout) == (0, b"")


async def test_a_proxy_is_not_asked_for_what_is_on_this_machine(
    home_server: LocalServer, home: Path, free_port: int
) -> None:
    nowhere = f"http://127.0.0.1:{free_port}"
    dead_end = {"http_proxy": nowhere, "https_proxy": nowhere, "all_proxy": nowhere}
    async with over_stdio(home, **dead_end, no_proxy="example.com") as agent:
        await agent.new_client()
    async with over_stdio(home, **dead_end, **home_server.env) as agent:
        await agent.new_client()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "b.com, a.com"}, "a.com,b.com,127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a.com", "no_proxy": "localhost"}, "localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_this_machine_is_added_to_what_needs_no_proxy(
    environ: dict[str, str], expected: str
) -> None:
    proxies.bypass_on_loopback(environ)
    assert environ["no_proxy"] == expected
    proxies.bypass_on_loopback(environ)
    assert environ["no_proxy"] == expected


_AROUND = " for self.request_id='7-3' and expected type self.model_cls=<class 'Output'>"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (f"Request failed: rank 4096 is over 512{_AROUND}", "rank 4096 is over 512."),
        (f"Request failed: Not now!{_AROUND}", "Not now!"),
        ("Request failed: for self.evident reasons", "for self.evident reasons."),
    ],
)
def test_a_failed_request_is_told_in_the_backends_own_words(said: str, told: str) -> None:
    error = tinker.RequestFailedError(
        said, request_id="7-3", category=tinker.types.RequestErrorCategory.User
    )
    with pytest.raises(RequestFailedError) as raised, sdk_errors.told():
        raise error
    assert raised.value.problem == told


def _refusal(status: int, body: object) -> tinker.APIStatusError:
    request = httpx.Request("POST", "http://127.0.0.1/api/v1/forward")
    text = f"Error code: {status} - {body}"
    return tinker.APIStatusError(text, response=httpx.Response(status, request=request), body=body)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (400, {"detail": "No such loss."}, "No such loss (HTTP 400)."),
        (
            422,
            {"detail": [{"loc": ["body", "rank"], "msg": "too high"}]},
            "body.rank: too high (HTTP 422).",
        ),
        (404, {"detail": "No run 'x'."}, "No run 'x'."),
        (502, "<html>Bad gateway</html>", "The backend refused the request (HTTP 502)."),
    ],
)
def test_a_refused_request_is_told_without_its_wrapping(
    status: int, body: object, told: str
) -> None:
    with pytest.raises(TinkerMcpError) as raised, sdk_errors.told():
        raise _refusal(status, body)
    assert raised.value.problem == told


def test_an_answer_that_the_sdk_wrapped_twice_is_unwrapped() -> None:
    answer = _refusal(404, {"detail": "No request 7-3."})
    said = f"Error retrieving result: {answer} with status 404{_AROUND}"
    with pytest.raises(ClientLostError) as raised, sdk_errors.told():
        raise ValueError(said) from answer
    assert raised.value.problem == "No request 7-3."


def test_the_sdk_tells_once_a_session_that_its_heartbeats_fail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sdk_logs.tell_lost_heartbeats_once()
    sdk_logs.tell_lost_heartbeats_once()
    logger = logging.getLogger("tinker.lib.internal_client_holder")
    for session in ("one", "one", "two", "one"):
        logger.warning(
            "Session heartbeat failed for 130 seconds for session %s. Last exception: x.", session
        )
    logger.warning("Something else")
    assert len(caplog.messages) == 3


def test_a_session_that_is_still_being_opened_is_let_go_without_waiting() -> None:
    opened, closed = threading.Event(), threading.Event()

    class Opening:
        """As the SDK's client while its backend does not answer: close waits for the session."""

        def close(self, _reason: str) -> None:
            assert opened.wait(30)
            closed.set()

    let_go(cast("Any", Opening()))
    assert not closed.is_set()
    opened.set()
    assert closed.wait(30)
