"""Runs in worker processes, as a server starts them, and looks at what these leave."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from attempts import held_out_sentences, sentences, spec_of

from servers import end_backends
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.planning.estimate import Estimate
from tinker_mcp.runs.planning.plan import Planned
from tinker_mcp.runs.states import ACTIVE
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.store.rows import RunRow
from tinker_mcp.store.runs import FILE_NAME, RunStore, exists

BOUND_S = 120.0
CYCLE_S = 0.2  # of the paced backend: a run of 12 steps can be met in its middle
_LOOK_S = 0.02


def planned(**changes: Any) -> Planned:
    """A run of the tiny model on eight sentences, as `spec_of` describes it."""
    train, held_out = sentences(), held_out_sentences()
    spec = spec_of(train, held_out, **changes)
    return Planned(spec, train, held_out, (), Estimate("local", {}, 0.0, 0.0))


def until(what: Callable[[], bool], bound_s: float = BOUND_S) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + bound_s
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(_LOOK_S)


def ended(supervisor: Supervisor, run_id: str, bound_s: float = BOUND_S) -> RunRow:
    """The run, once it is at an end."""
    until(lambda: supervisor.run(run_id).state not in ACTIVE, bound_s)
    return supervisor.run(run_id)


def reached(supervisor: Supervisor, run_id: str, step: int) -> RunRow:
    """The run, once a step of it is recorded."""
    until(lambda: supervisor.run(run_id).step >= step)
    return supervisor.run(run_id)


def completed(supervisor: Supervisor, run_id: str, home: Path) -> RunRow:
    """The run, which must have come to its planned end."""
    row = ended(supervisor, run_id)
    log = RunFolder.of(home, run_id).log
    assert row.state == "completed", f"{row.state}: {row.detail}\n{log.read_text()}"
    return row


def worker_of(row: RunRow) -> psutil.Process:
    """The process of a run at work."""
    assert row.pid is not None
    process = psutil.Process(row.pid)
    assert row.run_id in process.cmdline()
    return process


def suspend_between_writes(process: psutil.Process, home: Path) -> None:
    """Suspend a worker while it holds no lock of the store; test_runs_stuck.py has the other."""
    for _ in range(1000):
        process.suspend()
        store = sqlite3.connect(home / FILE_NAME, timeout=0, isolation_level=None)
        try:
            store.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:
            process.resume()
            time.sleep(_LOOK_S)
        finally:
            store.close()
    raise AssertionError("it holds the store all the time")


def kill(supervisor: Supervisor, run_id: str) -> None:
    """Kill a run's worker, and wait until it is gone."""
    process = worker_of(supervisor.run(run_id))
    process.kill()
    psutil.wait_procs([process], timeout=10)


def losses(home: Path, run_id: str) -> dict[int, float]:
    """Training losses by step."""
    with RunStore(home) as store:
        rows = store.metrics(run_id, "train")
    return {row.step: row.numbers["train_mean_nll"] for row in rows}


def held_out_losses(home: Path, run_id: str) -> dict[int, float]:
    with RunStore(home) as store:
        rows = store.metrics(run_id, "eval")
    return {row.step: row.numbers["test/nll"] for row in rows}


def metric_lines(home: Path, run_id: str, name: str = "train_mean_nll") -> list[tuple[int, float]]:
    """The same from metrics.jsonl, in the order of its lines: a doubled one is seen."""
    lines = map(json.loads, RunFolder.of(home, run_id).metrics.read_text().splitlines())
    return [(line["step"], line[name]) for line in lines if name in line]


def checkpoint_lines(home: Path, run_id: str) -> list[int]:
    """The steps in checkpoints.jsonl."""
    written = RunFolder.of(home, run_id).checkpoints.read_text()
    return [json.loads(line)["step"] for line in written.splitlines()]


def state_events(home: Path, run_id: str) -> list[str]:
    """The states that a run was in, each with its detail."""
    with RunStore(home) as store:
        return [event.what for event in store.events(run_id) if event.kind == "state"]


def end_all(home: Path) -> None:
    """End the workers of a home, and a backend that they started."""
    processes = []
    if exists(home):
        with RunStore(home) as store:
            pids = [row.pid for row in store.newest() if row.state in ACTIVE]
        processes += [process for pid in pids if (process := _worker(pid))]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)
    end_backends(home)


def _worker(pid: int | None) -> psutil.Process | None:
    try:
        process = psutil.Process(pid or 0)
        return process if "tinker_mcp.runs.worker" in process.cmdline() else None
    except psutil.Error:
        return None
