"""`tinker-local` as a process."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from click.testing import CliRunner

from servers import LocalServer, serve_command, start_server
from tinker_local.cli import main
from tiny_data import TINY

BOUND_S = 30.0


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinker_local", *args],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )


def _assert_sentence(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_ready_line_tells_all_that_a_client_needs(tiny_server: LocalServer) -> None:
    assert tiny_server.base_url.startswith("http://127.0.0.1:")
    assert tiny_server.api_key.startswith("tml-local-")
    assert tiny_server.pid == tiny_server.process.pid
    assert tiny_server.models == [TINY]
    assert tiny_server.env["TINKER_BASE_URL"] == tiny_server.base_url
    assert tiny_server.env["TINKER_API_KEY"] == tiny_server.api_key
    assert tiny_server.env["HF_HUB_OFFLINE"] == "1"
    assert Path(tiny_server.env["HF_HOME"]).is_dir()


def test_it_answers_once_the_ready_line_is_there(tiny_server: LocalServer) -> None:
    assert httpx.get(f"{tiny_server.base_url}/healthz").json() == {"status": "ok"}


def test_its_note_is_for_the_owner_alone(tiny_server: LocalServer) -> None:
    note = tiny_server.state_dir / "server.json"

    assert json.loads(note.read_text())["api_key"] == tiny_server.api_key
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert stat.S_IMODE(tiny_server.state_dir.stat().st_mode) == 0o700


def test_the_key_is_neither_in_the_command_line_nor_in_the_log(tiny_server: LocalServer) -> None:
    httpx.get(f"{tiny_server.base_url}/api/v1/nonsense", headers={"X-API-Key": tiny_server.api_key})

    assert tiny_server.api_key not in " ".join(psutil.Process(tiny_server.pid).cmdline())
    assert tiny_server.api_key not in tiny_server.log.read_text()


def test_env_prints_export_lines_that_a_shell_can_read(tiny_server: LocalServer) -> None:
    done = _run("env", "--state-dir", str(tiny_server.state_dir))

    assert done.returncode == 0
    words = [shlex.split(line) for line in done.stdout.splitlines()]
    assert words == [["export", f"{name}={value}"] for name, value in tiny_server.env.items()]


def test_env_quotes_what_a_shell_would_run(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from tinker_local import running
    from tinker_local.cli import main

    lock = running.claim(tmp_path)
    home = "/home/a b; rm -rf '~'"
    running.publish(tmp_path, running.RunningServer("u", "k", 1, [], {"HF_HOME": home}))
    try:
        [line] = CliRunner().invoke(main, ["env", "--state-dir", str(tmp_path)]).output.splitlines()
    finally:
        lock.release()

    assert shlex.split(line) == ["export", f"HF_HOME={home}"]


def test_env_without_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    _assert_sentence(_run("env", "--state-dir", str(tmp_path / "none")), "`tinker-local serve`")


def test_a_second_server_on_the_same_state_directory_is_refused(tiny_server: LocalServer) -> None:
    done = _run(*serve_command(tiny_server.state_dir)[3:])

    _assert_sentence(done, f"Another tinker-local serves {tiny_server.state_dir}")
    assert "--state-dir" in done.stderr
    assert (tiny_server.state_dir / "server.json").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "::"])  # noqa: S104
def test_an_address_beyond_this_machine_is_refused(tmp_path: Path, host: str) -> None:
    done = _run(*serve_command(tmp_path / "state", "--host", host)[3:])

    _assert_sentence(done, f"--host {host} is no loopback address")
    assert not (tmp_path / "state" / "server.json").exists()


def test_a_taken_port_is_refused(tiny_server: LocalServer, tmp_path: Path) -> None:
    done = _run(*serve_command(tmp_path / "state", "--port", str(tiny_server.port))[3:])

    _assert_sentence(done, "Use --port 0")


@pytest.mark.parametrize("model", ["nonsense", "a b/c", "./missing", "org/model=/missing"])
def test_an_unknown_model_is_a_sentence(tmp_path: Path, model: str) -> None:
    done = _run(*serve_command(tmp_path / "state", model=model)[3:])

    _assert_sentence(done, model)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_seconds_and_withdraws_the_note(
    own_server: LocalServer, end: signal.Signals
) -> None:
    own_server.process.send_signal(end)

    own_server.process.wait(5)
    assert not (own_server.state_dir / "server.json").exists()
    assert "Traceback" not in own_server.log.read_text()


def test_sigterm_ends_it_in_seconds_while_it_computes_and_tells_who_waits(
    own_server: LocalServer,
) -> None:
    import tinker
    from tinker import types

    service = tinker.ServiceClient(base_url=own_server.base_url, api_key=own_server.api_key)
    sampler = service.create_sampling_client(base_model=TINY).result(BOUND_S)
    prompt = types.ModelInput.from_ints([97])
    endless = sampler.sample(prompt, 64, types.SamplingParams(max_tokens=4000, stop=[]))
    with pytest.raises(TimeoutError):
        endless.result(1)

    own_server.process.terminate()

    with pytest.raises(tinker.RequestFailedError, match="tinker-local was ended"):
        endless.result(5)
    assert own_server.process.wait(5) == 0
    assert not (own_server.state_dir / "server.json").exists()
    assert "Traceback" not in own_server.log.read_text()
    service.holder.close()  # a close of the session would ask the dead server for minutes


def test_a_server_that_cannot_start_ends_with_a_failure(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "runs").write_text("a file where a folder must be")

    done = _run(*serve_command(tmp_path / "state")[3:])

    assert done.returncode == 1
    assert done.stdout == ""
    assert "runs" in done.stderr


def test_without_a_client_it_ends_after_the_idle_time(tmp_path: Path) -> None:
    server = start_server(tmp_path / "state", "--idle-exit-s", "0.5")

    assert server.process.wait(BOUND_S) == 0
    assert not (server.state_dir / "server.json").exists()
    server.stop()


def test_the_note_of_a_killed_server_is_withdrawn_by_its_successor(tmp_path: Path) -> None:
    from tinker_local import running
    from tinker_local.errors import UserInputError

    running.publish(tmp_path, running.RunningServer("http://dead", "k", 1, [], {}))

    lock = running.claim(tmp_path)

    with pytest.raises(UserInputError, match="No tinker-local serves"):
        running.find(tmp_path)
    lock.release()


def test_several_models_can_come_from_the_environment(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tinker_local", "serve", "--state-dir", str(tmp_path / "state")],
        env={**os.environ, "TINKER_LOCAL_MODELS": "first-of-two second-of-two"},
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )

    assert done.returncode == 1
    assert "'first-of-two' is neither" in done.stderr


def test_a_port_that_does_not_exist_is_refused_in_a_sentence() -> None:
    result = CliRunner().invoke(main, ["serve", "--port", "99999"])
    assert result.exit_code == 2
    assert "99999 is not in the range 0<=x<=65535" in result.output


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(main, ["serve", "--state-dir", str(tmp_path / "file" / "x")])
    assert result.exit_code == 1
    assert "cannot be used: Not a directory" in result.output
