"""Kills a worker at each write of a run, one run a write, and resumes it; prints what became of it.

`python every_write.py HOME` prints a JSON list with one entry a run, the first of which was not
killed. A file is written before the row of the same transaction, so a kill before a write is also
one after the write before it. The worker's own `main` runs, in forks of this process, since
importing torch anew for each would take seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detached import checkpoint_lines, held_out_losses, losses, metric_lines, planned

from tinker_mcp.runs import methods, worker
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings
from tinker_mcp.store.runs import RunStore

STEPS = 3
_WRITES = {
    RunStore: ("move", "spend", "record", "record_checkpoint", "rewind", "tell"),
    RunFolder: ("append_metrics", "append_checkpoint", "rewind"),
}


class InThisProcess(Supervisor):
    """Starts no worker; a fork of this process does its work."""

    def _spawn(self, run_id: str, lease: str) -> int:
        self.lease = lease
        return os.getpid()


def main(home: Path) -> None:
    import tinker  # noqa: F401 - once, before the forks
    import tinker_cookbook.utils.lr_scheduling  # noqa: F401

    methods.method("sft")

    supervisor = InThisProcess(Settings(home=home))
    outcomes = [_pursued(supervisor, home, kill_at=None)]
    while outcomes[-1]["kills"] or len(outcomes) == 1:
        outcomes.append(_pursued(supervisor, home, kill_at=len(outcomes)))
    sys.stdout.write(json.dumps(outcomes))


def _pursued(supervisor: InThisProcess, home: Path, kill_at: int | None) -> dict[str, Any]:
    run_id = supervisor.start(planned(steps=STEPS, save_every=2, eval_every=2)).run_id
    kills = 0
    if _worked(run_id, supervisor.lease, kill_at) == -signal.SIGKILL:
        kills = 1
        _take_over(supervisor, home, run_id)
        assert _worked(run_id, supervisor.lease, None) == 0
    return {
        "kills": kills,
        "state": supervisor.run(run_id).state,
        "losses": list(losses(home, run_id).items()),
        "held_out": list(held_out_losses(home, run_id).items()),
        "metric_lines": metric_lines(home, run_id),
        "held_out_lines": metric_lines(home, run_id, "test/nll"),
        "checkpoint_lines": checkpoint_lines(home, run_id),
    }


def _take_over(supervisor: InThisProcess, home: Path, run_id: str) -> None:
    """What `resume` does, without waiting until the run counts as crashed."""
    with RunStore(home) as store:
        assert supervisor._hand_over(store, store.get(run_id))


def _worked(run_id: str, lease: str, kill_at: int | None) -> int:
    """The exit status of a worker, negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        _be_the_worker(run_id, lease, kill_at)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _be_the_worker(run_id: str, lease: str, kill_at: int | None) -> None:
    status = 1
    try:
        sys.argv = ["worker", run_id, lease]
        _kill_at(kill_at)
        worker.main()
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def _kill_at(number: int | None) -> None:
    """Have this process kill itself before its n-th write."""
    passed = 0

    def border() -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def bordered(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            border()
            return write(*args, **kwargs)

        return wrapped

    for kind, names in _WRITES.items():
        for name in names:
            setattr(kind, name, bordered(getattr(kind, name)))


if __name__ == "__main__":
    # Below the home of the backend that the caller started; temporary files stay there, too.
    tempfile.tempdir = sys.argv[1]
    os.environ.update(TINKER_MCP_HOME=sys.argv[1], TINKER_MCP_BACKEND="local")
    main(Path(sys.argv[1]))
