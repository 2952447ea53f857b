"""A run that is killed and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from detached import (
    CYCLE_S,
    checkpoint_lines,
    completed,
    held_out_losses,
    kill,
    losses,
    metric_lines,
    planned,
    reached,
    state_events,
    until,
)

from servers import backends_of, start_server
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings

EVERY_WRITE = Path(__file__).with_name("every_write.py")
TESTS = EVERY_WRITE.parent.parent
ENVIRON = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(EVERY_WRITE.parent), str(TESTS), str(TESTS.parent)]),
}
PACED: dict[str, Any] = {"steps": 12, "save_every": 4, "eval_every": 4, "batch_size": 2}
# A server, as far as a run is concerned: it starts one, says which, and stays.
SERVER = """
import sys, threading
from pathlib import Path

import structlog
from detached import planned
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
supervisor = Supervisor(Settings(home=Path(sys.argv[1])))
run = supervisor.start(planned(steps=12, save_every=4, eval_every=4, batch_size=2))
print(run.run_id, flush=True)
threading.Event().wait()
"""


@pytest.fixture(scope="session")
def untouched(paced_home: Path) -> str:
    """A run that nothing happened to."""
    supervisor = Supervisor(Settings(home=paced_home))
    run_id = supervisor.start(planned(**PACED)).run_id
    completed(supervisor, run_id, paced_home)
    return run_id


def assert_same(home: Path, run_id: str, untouched: str, of: Path | None = None) -> None:
    """All numbers are those of the untouched run (of another home), in store and files."""
    expected = losses(of or home, untouched)
    assert list(expected) == list(range(1, 13))
    assert losses(home, run_id) == expected
    assert held_out_losses(home, run_id) == held_out_losses(of or home, untouched)
    assert sorted(metric_lines(home, run_id)) == list(expected.items())
    assert sorted(metric_lines(home, run_id, "test/nll")) == list(
        held_out_losses(home, run_id).items()
    )
    assert checkpoint_lines(home, run_id) == [4, 8, 12]


@pytest.fixture(scope="session")
def killed_at_each_write(
    runs_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What became of runs that were killed, each at another write; the first was not."""
    log = tmp_path_factory.mktemp("every-write") / "log"
    with log.open("wb") as errors:
        script = subprocess.run(
            [sys.executable, str(EVERY_WRITE), str(runs_home)],
            env=ENVIRON,
            stdout=subprocess.PIPE,
            stderr=errors,
            check=False,
        )
    assert script.returncode == 0, log.read_text()[-4000:]
    outcomes: list[dict[str, Any]] = json.loads(script.stdout)
    return outcomes


@pytest.mark.timeout(600)
def test_a_kill_between_any_two_writes_changes_no_loss(
    killed_at_each_write: list[dict[str, Any]],
) -> None:
    untouched, *others = killed_at_each_write
    assert [step for step, _ in untouched["losses"]] == [1, 2, 3]
    assert len(others) > 20
    for index, outcome in enumerate(others, start=1):
        assert {**outcome, "kills": 0} == untouched, f"killed before write {index}"


@pytest.mark.parametrize("after_step", [0, 3, 8])
def test_a_worker_that_is_killed_in_its_work_and_resumed_ends_with_the_same_losses(
    paced: Supervisor, paced_home: Path, after_step: int, untouched: str
) -> None:
    run_id = paced.start(planned(**PACED)).run_id
    reached(paced, run_id, after_step)
    time.sleep(random.uniform(0, 2 * CYCLE_S))  # noqa: S311 - any moment will do
    kill(paced, run_id)
    until(lambda: paced.run(run_id).state == "crashed", bound_s=15)

    paced.resume(run_id)

    completed(paced, run_id, paced_home)
    assert_same(paced_home, run_id, untouched)


def test_a_worker_that_is_killed_again_and_again_comes_to_the_same_end(
    paced: Supervisor, paced_home: Path, untouched: str
) -> None:
    run_id = paced.start(planned(**PACED)).run_id
    for step in (1, 5, 9):
        reached(paced, run_id, step)
        kill(paced, run_id)
        until(lambda: paced.run(run_id).state == "crashed", bound_s=15)
        paced.resume(run_id)

    completed(paced, run_id, paced_home)
    assert_same(paced_home, run_id, untouched)


def test_a_killed_worker_shows_as_crashed_with_its_last_step(
    paced: Supervisor, paced_home: Path
) -> None:
    run_id = paced.start(planned(**PACED)).run_id
    reached(paced, run_id, 3)
    kill(paced, run_id)

    until(lambda: paced.run(run_id).state == "crashed", bound_s=15)

    row = paced.run(run_id)
    assert row.step == max(losses(paced_home, run_id)) >= 3
    assert row.detail == f"Its worker died; its last recorded step is {row.step}."
    assert [(other.run_id, other.state) for other in paced.runs() if other.run_id == run_id] == [
        (run_id, "crashed")
    ]


def test_a_run_goes_on_when_the_server_that_started_it_is_killed(
    paced: Supervisor, paced_home: Path, untouched: str
) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(paced_home)],
        env=ENVIRON,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            assert server.stdout is not None
            run_id = server.stdout.readline().strip()
            reached(paced, run_id, 1)
        finally:
            server.kill()

    completed(paced, run_id, paced_home)
    assert_same(paced_home, run_id, untouched)


def test_a_run_waits_for_its_backend_and_goes_on_without_doubling_a_metric(
    own_runs_home: Path, untouched: str, paced_home: Path
) -> None:
    supervisor = Supervisor(Settings(home=own_runs_home))
    server = start_server(own_runs_home / "local", "--cycle-s", str(CYCLE_S))
    try:
        run_id = supervisor.start(planned(**PACED)).run_id
        reached(supervisor, run_id, 5)
    finally:
        server.kill()

    completed(supervisor, run_id, own_runs_home)  # on a backend that the worker started

    assert_same(own_runs_home, run_id, untouched, of=paced_home)
    states = state_events(own_runs_home, run_id)
    assert states[0] == "starting"
    assert states[1] == "running"
    assert any(state.startswith("waiting The backend local") for state in states)
    assert states[-2] == "running"
    assert states[-1].startswith("completed")
    until(lambda: not backends_of(own_runs_home), bound_s=30)  # it ends with the worker
