"""A worker that is suspended amid a write holds the database of all runs, until it is ended."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from detached import completed, kill, losses, planned, reached

from tinker_mcp.errors import StoreBusyError
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.store import database
from tinker_mcp.store.runs import FILE_NAME

WRITER = """
import os, signal, sqlite3, sys, time
sys.stdin.readline()
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("written", flush=True)
if sys.argv[2] == "suspended":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(100)
"""

Writer = subprocess.Popen[str]


@pytest.fixture
def crashed(paced: Supervisor) -> str:
    """A run whose worker was killed after five of its twelve steps."""
    run_id = paced.start(planned(steps=12, save_every=4)).run_id
    reached(paced, run_id, 5)
    kill(paced, run_id)
    return run_id


@pytest.fixture
def amid_a_write(
    paced_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Writer]]:
    """Puts a process with some arguments in the place of a run's worker, amid a write."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.3)
    path, begun = paced_home / FILE_NAME, []

    def begin(run_id: str, how: str, *arguments: str) -> Writer:
        command = [sys.executable, "-c", WRITER, str(path), how, run_id, *arguments]
        pipe = subprocess.PIPE
        writer = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        begun.append(writer)
        with sqlite3.connect(path) as store:  # ended with the block
            store.execute(
                "UPDATE runs SET pid = ?, heartbeat_at = ? WHERE run_id = ?",
                (writer.pid, time.time() - 60, run_id),
            )
        store.close()
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "written\n"
        return writer

    yield begin
    for writer in begun:
        with writer:
            writer.kill()


def test_a_resumed_run_ends_its_worker_that_is_suspended_amid_a_write(
    paced: Supervisor, paced_home: Path, crashed: str, amid_a_write: Callable[..., Writer]
) -> None:
    worker = amid_a_write(crashed, "suspended", str(paced.run(crashed).lease))

    paced.resume(crashed)

    assert worker.wait(5) == -signal.SIGKILL
    completed(paced, crashed, paced_home)
    assert list(losses(paced_home, crashed)) == list(range(1, 13))


def test_a_stopped_run_ends_its_worker_that_is_suspended_amid_a_write(
    paced: Supervisor, crashed: str, amid_a_write: Callable[..., Writer]
) -> None:
    worker = amid_a_write(crashed, "suspended", str(paced.run(crashed).lease))

    assert paced.stop(crashed, save=False).state == "stopped"

    assert worker.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("how", "is_its_worker"), [("suspended", False), ("waiting for its turn", True)]
)
def test_another_process_and_a_worker_that_waits_are_left_alone(
    paced: Supervisor,
    crashed: str,
    amid_a_write: Callable[..., Writer],
    how: str,
    is_its_worker: bool,
) -> None:
    lease = str(paced.run(crashed).lease)
    holder = amid_a_write(crashed, how, lease if is_its_worker else "another lease")

    with pytest.raises(StoreBusyError, match="Another process holds the database of runs"):
        paced.resume(crashed)

    assert holder.poll() is None
