"""The server ends with its host, however that ends, and the local backend with its last user."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from host_process import END_BOUND_S, START_BOUND_S, WAYS, start

from servers import backends_of, start_server
from tinker_mcp.training.lifeline import Lifeline, reading_end


def wait_for_backend(home: Path) -> psutil.Process:
    """The backend, once it serves."""
    bound = time.monotonic() + START_BOUND_S
    while not (home / "local" / "server.json").exists():
        assert time.monotonic() < bound, "no backend"
        time.sleep(0.05)
    note = json.loads((home / "local" / "server.json").read_text())
    return psutil.Process(note["pid"])


def assert_nothing_is_left(home: Path) -> None:
    """No process serves `home` after END_BOUND_S, no note tells of one, and its lock is free."""
    _, alive = psutil.wait_procs(backends_of(home), timeout=END_BOUND_S)
    assert [process.cmdline() for process in alive] == []
    assert not (home / "local" / "server.json").exists()
    with FileLock(home / "local" / "server.lock").acquire(timeout=0):
        pass


@pytest.mark.parametrize("way", WAYS)
def test_a_server_ends_within_seconds_while_its_pipe_stays_open(way: str, tmp_path: Path) -> None:
    hosted = start(tmp_path / "home", tmp_path / "log", way=way)
    began = time.monotonic()
    hosted.end(way)
    status = hosted.wait()
    assert time.monotonic() - began < END_BOUND_S
    assert status == (-9 if way in ("SIGKILL", "death of the parent") else 0)
    assert hosted.log.read_text() == ""


def test_twenty_starts_and_kills_leave_no_process_and_no_lock(
    own_home: Path, tmp_path: Path
) -> None:
    ways = list(WAYS)
    for turn in range(4):
        order = ways[turn:] + ways[:turn]
        servers = [(way, start(own_home, tmp_path / "log", way=way)) for way in order]
        for _, hosted in (servers[0], servers[-1]):  # one starts the backend, the other joins
            hosted.ask("list_models")
        wait_for_backend(own_home)
        for way, hosted in servers:
            hosted.end(way)
        for _, hosted in servers:
            hosted.wait()
        assert_nothing_is_left(own_home)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_backend_outlives_the_server_that_started_it_while_another_uses_it(
    own_home: Path, tmp_path: Path
) -> None:
    first = start(own_home, tmp_path / "log")
    first.call("list_models")
    second = start(own_home, tmp_path / "log")
    second.call("list_models")
    backend = wait_for_backend(own_home)
    first.end("SIGKILL")
    first.wait()
    with pytest.raises(psutil.TimeoutExpired):
        backend.wait(5)  # more than twice as long as it would stay alone
    assert not second.call("list_models")["isError"]
    second.end("EOF")
    second.wait()
    assert_nothing_is_left(own_home)


def test_a_server_ends_in_the_middle_of_a_long_call(own_home: Path, tmp_path: Path) -> None:
    hosted = start(own_home, tmp_path / "log")
    hosted.ask("list_models")
    wait_for_backend(own_home)
    hosted.end("SIGTERM")
    assert hosted.wait() == 0
    assert_nothing_is_left(own_home)


def test_a_backend_started_by_hand_stays(own_home: Path, tmp_path: Path) -> None:
    server = start_server(own_home / "local")
    hosted = start(own_home, tmp_path / "log")
    hosted.call("list_models")
    hosted.end("EOF")
    hosted.wait()
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(server.pid).wait(3)
    assert server.stop() == 0


def test_servers_that_start_a_backend_at_once_share_its_pipe(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as starting:
        for number in range(50):
            folder = tmp_path / str(number)
            folder.mkdir()
            ends = list(starting.map(reading_end, [folder] * 8))
            assert len({os.fstat(end).st_ino for end in ends}) == 1
            for end in ends:
                os.close(end)


def test_holding_on_needs_a_backend_that_listens(tmp_path: Path) -> None:
    lifeline = Lifeline(tmp_path)
    lifeline.hold()  # no pipe: nothing to hold, and no error
    with os.fdopen(reading_end(tmp_path), "rb") as backend:
        assert backend.read(1) == b""  # nobody holds it
        lifeline.hold()
        lifeline.hold()
        assert backend.read(1) is None  # somebody does, and says nothing
        lifeline.let_go()
        assert backend.read(1) == b""
