"""Workers that live and do nothing: suspended, or waiting for a disk that does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import structlog

from tinker_mcp.store.rows import RunRow

log = structlog.get_logger()

_HELD = "TtDU"  # ps: stopped, traced, in uninterruptible sleep (U: macOS)
_END_LIMIT_S = 5.0
_LOOK_S = 0.05


def end_worker(row: RunRow) -> bool:
    """Kill the worker that holds a run's lease if it is stuck; whether it was, and is gone.

    A pid may be another process's by now, or one of another container's: only a process with the
    run's lease among its arguments is its worker. One that only waits for its turn is not stuck.
    """
    if row.pid is None or row.lease is None:
        return False
    state, arguments = _seen(row.pid)
    if row.lease not in arguments or state not in _HELD:
        return False
    log.warning("stuck_worker_killed", run_id=row.run_id, pid=row.pid, state=state)
    try:
        os.kill(row.pid, signal.SIGKILL)
    except OSError:  # gone meanwhile, or not ours
        return False
    deadline = time.monotonic() + _END_LIMIT_S
    while row.lease in _seen(row.pid)[1]:  # a zombie has no arguments
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def _seen(pid: int) -> tuple[str, list[str]]:
    """Of a process, the letter of its state and its command line; " " and nothing without one."""
    process = Path("/proc") / str(pid)
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        return state, (process / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return _seen_by_ps(pid) if not Path("/proc/self").exists() else (" ", [])


def _seen_by_ps(pid: int) -> tuple[str, list[str]]:
    """The same where there is no /proc, as on macOS."""
    command = ["/bin/ps", "-ww", "-o", "stat=,command=", "-p", str(pid)]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return (told[0][0], told[1:]) if told else (" ", [])
