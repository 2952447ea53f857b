"""Starting, resuming and stopping runs; several supervisors on one home."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from detached import (
    completed,
    ended,
    kill,
    losses,
    planned,
    reached,
    state_events,
    until,
    worker_of,
)

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.showing.views import summary
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.runs.supervisor import Supervisor, as_told
from tinker_mcp.settings import Settings
from tinker_mcp.store.rows import RunRow
from tinker_mcp.store.runs import RunStore, exists

LONG: dict[str, Any] = {"steps": 400, "save_every": 4}


class Unmanned(Supervisor):
    """Starts no process: `manned` has the leases that one would have been started with."""

    def __init__(self, home: Path, environ: dict[str, str] | None = None) -> None:
        super().__init__(Settings(home=home), environ or {})
        self.manned: list[str] = []

    def _spawn(self, run_id: str, lease: str) -> int:
        self.manned.append(lease)
        return os.getpid()

    def end(self, run_id: str, state: str, reason: str | None = None, step: int = 0) -> None:
        """What its worker would write."""
        with RunStore(self._settings.home) as store:
            lease = self.manned[-1]
            if step:
                store.record(run_id, lease, "train", step, {"train_mean_nll": 1.0})
                store.record_checkpoint(run_id, lease, step, "state", "sampler", True)
            store.move(run_id, lease, state, reason=reason, detail="So it was.")


def at_once(count: int, do: Callable[[int], object]) -> list[object]:
    """What several threads got that did something at the same moment; errors are kept, too."""
    ready = threading.Barrier(count)
    got: list[object] = []

    def run(number: int) -> None:
        ready.wait()
        try:
            got.append(do(number))
        except Exception as error:
            got.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


# Start


def test_a_started_run_has_a_row_a_folder_and_its_data(tmp_path: Path) -> None:
    row = Unmanned(tmp_path).start(planned())

    folder = RunFolder.of(tmp_path, row.run_id)
    spec = RunSpec.model_validate_json(row.spec)
    assert row.state == "starting"
    assert json.loads(folder.config.read_text())["data_sha256"]["train"] == spec.train.sha256
    assert re.fullmatch(r"[0-9a-f]{64}", spec.train.sha256)
    assert folder.train_data.exists()
    assert folder.held_out_data.exists()
    assert folder.path.stat().st_mode & 0o077 == 0


def test_the_same_key_twice_starts_one_run(tmp_path: Path) -> None:
    supervisor = Unmanned(tmp_path)
    first = supervisor.start(planned(), "key")

    again = supervisor.start(planned(), "key")

    assert again.run_id == first.run_id
    assert len(supervisor.manned) == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_the_same_key_with_other_arguments_is_refused_with_what_differs(tmp_path: Path) -> None:
    supervisor = Unmanned(tmp_path)
    asked = RunArguments(method="sft", data="rows.jsonl", steps=5, idempotency_key="key")
    first = supervisor.start(planned(), "key", asked)
    assert supervisor.start(planned(), "key", asked).run_id == first.run_id

    other = asked.model_copy(update={"steps": 6, "name": "mine"})
    with pytest.raises(InvalidInputError) as refused:
        supervisor.start(planned(), "key", other)

    assert refused.value.problem == (
        f"This idempotency_key started {first.run_id} with other arguments: steps=5, now 6; "
        'name=none, now "mine".'
    )
    assert len(supervisor.manned) == 1


def test_the_warnings_of_a_plan_stay_with_its_run(tmp_path: Path) -> None:
    supervisor = Unmanned(tmp_path)
    told = replace(planned(), warnings=["Nothing is held out."])
    row = supervisor.start(told, "key")
    supervisor.start(told, "key")
    with RunStore(tmp_path) as store:
        assert summary(store, row).warnings == ("Nothing is held out.",)


def test_of_servers_that_start_with_a_key_at_the_same_moment_one_starts_it(tmp_path: Path) -> None:
    servers = [Unmanned(tmp_path) for _ in range(6)]

    rows = at_once(6, lambda number: servers[number].start(planned(), "key"))

    assert len({row.run_id for row in rows if isinstance(row, RunRow)}) == 1
    assert [row for row in rows if not isinstance(row, RunRow)] == []
    assert sum(len(server.manned) for server in servers) == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_run_whose_server_died_before_it_had_a_worker_gets_one_with_the_same_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Unmanned(tmp_path)

    def killed(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "take", killed)
        with pytest.raises(KeyboardInterrupt):
            supervisor.start(planned(), "key")
    assert supervisor.manned == []

    row = supervisor.start(planned(), "key")

    assert len(supervisor.manned) == 1
    assert supervisor.run(row.run_id).lease == supervisor.manned[0]


def test_a_worker_knows_the_home_and_the_backend_and_no_key_it_does_not_need(
    tmp_path: Path,
) -> None:
    server = {"TINKER_API_KEY": "tml-key", "TINKER_MCP_TOKEN": "token", "PATH": "/bin"}
    local = Supervisor(Settings(home=tmp_path, backend="local", api_key="tml-key"), server)
    hosted = Supervisor(
        Settings(home=tmp_path, base_url="http://127.0.0.1:1", api_key="tml-key"), server
    )

    assert local._worker_environ() == {
        "PATH": "/bin",
        "TINKER_MCP_HOME": str(tmp_path),
        "TINKER_MCP_BACKEND": "local",
        "TINKER_LOCAL_CACHE": str(Settings().local_cache),
    }
    assert hosted._worker_environ() == {
        "PATH": "/bin",
        "TINKER_MCP_HOME": str(tmp_path),
        "TINKER_MCP_BACKEND": "hosted",
        "TINKER_BASE_URL": "http://127.0.0.1:1",
        "TINKER_API_KEY": "tml-key",
        "TINKER_LOCAL_CACHE": str(Settings().local_cache),
    }


# Told


def test_looking_for_runs_makes_no_store(tmp_path: Path) -> None:
    supervisor = Supervisor(Settings(home=tmp_path))

    assert supervisor.runs() == []
    with pytest.raises(NotFoundError, match="No run 'run-1'; there is none yet"):
        supervisor.run("run-1")
    assert not exists(tmp_path)


def row_of(age_s: float, pid: int | None, now: float, state: str = "running") -> RunRow:
    return RunRow(
        run_id="run-1",
        spec="{}",
        state=state,
        reason=None,
        detail=None,
        step=7,
        created_at=now,
        started_at=now,
        ended_at=None,
        idempotency_key=None,
        lease="lease",
        pid=pid,
        heartbeat_at=now - age_s,
        stop_asked=None,
        tokens=0,
        usd=0.0,
    )


@pytest.mark.parametrize(
    ("age_s", "is_alive", "told"),
    [
        (0.0, True, "running"),
        (9.0, True, "running"),
        (11.0, True, "crashed"),
        (4.0, False, "crashed"),
        (1.0, False, "running"),  # of another container, which beats
    ],
)
def test_a_run_at_work_is_told_by_its_heartbeat_and_its_process(
    age_s: float, is_alive: bool, told: str
) -> None:
    gone = psutil.Popen(["true"])
    gone.wait()
    pid = os.getpid() if is_alive else gone.pid

    row = as_told(row_of(age_s, pid, time.time()))

    assert row.state == told
    assert ("last recorded step is 7" in (row.detail or "")) == (told == "crashed")


# Resume


@pytest.mark.parametrize(
    ("state", "reason", "changes", "said"),
    [
        ("completed", None, {}, "is complete after 6 steps.*Give steps above 6"),
        ("completed", None, {"steps": 6}, "is complete after 6 steps"),
        ("stopped", "user", {"steps": 5}, "is at step 6, past steps=5"),
        ("stopped", "divergence", {}, "would diverge again.*lower learning_rate"),
        ("stopped", "user", {"steps": 0}, "steps=0 is not above 0"),
        ("stopped", "user", {"max_usd": -1.0}, "max_usd=-1.0 is not above 0"),
    ],
)
def test_a_resume_that_can_come_to_nothing_is_refused(
    tmp_path: Path, state: str, reason: str | None, changes: dict[str, Any], said: str
) -> None:
    supervisor = Unmanned(tmp_path)
    run_id = supervisor.start(planned()).run_id
    supervisor.end(run_id, state, reason, step=6)

    with pytest.raises(InvalidInputError, match=said):
        supervisor.resume(run_id, **changes)

    assert len(supervisor.manned) == 1
    assert supervisor.run(run_id).state == state


def test_a_run_without_money_left_is_resumed_with_more(tmp_path: Path) -> None:
    supervisor = Unmanned(tmp_path)
    run_id = supervisor.start(planned(max_usd=1.0, usd_per_million=1.0)).run_id
    with RunStore(tmp_path) as store:
        store.spend(run_id, supervisor.manned[0], 1_000_000, 1.0)
    supervisor.end(run_id, "stopped", "budget", step=3)

    with pytest.raises(InvalidInputError, match=r"has spent \$1\.0000 of max_usd \$1\.0000"):
        supervisor.resume(run_id)
    row = supervisor.resume(run_id, max_usd=2.0)

    assert (row.state, row.usd) == ("starting", 1.0)
    assert RunSpec.model_validate_json(row.spec).max_usd == 2.0


def test_a_diverged_run_is_resumed_by_whoever_accepts_that(tmp_path: Path) -> None:
    supervisor = Unmanned(tmp_path)
    run_id = supervisor.start(planned()).run_id
    supervisor.end(run_id, "stopped", "divergence", step=3)

    row = supervisor.resume(run_id, accept_divergence=True)

    assert not RunSpec.model_validate_json(row.spec).stops_on_divergence


def test_a_changed_number_of_steps_is_kept_in_row_and_folder(tmp_path: Path) -> None:
    supervisor = Unmanned(tmp_path)
    run_id = supervisor.start(planned()).run_id
    supervisor.end(run_id, "completed", step=6)

    row = supervisor.resume(run_id, steps=9)

    assert (row.state, row.step) == ("starting", 6)
    assert RunSpec.model_validate_json(row.spec).steps == 9
    assert json.loads(RunFolder.of(tmp_path, run_id).config.read_text())["spec"]["steps"] == 9


def test_a_run_of_the_hosted_service_is_not_resumed_on_the_local_backend(tmp_path: Path) -> None:
    supervisor = Unmanned(tmp_path)
    run_id = supervisor.start(planned(backend="hosted")).run_id
    supervisor.end(run_id, "failed", step=3)

    with pytest.raises(InvalidInputError, match="--backend hosted"):
        supervisor.resume(run_id)


def test_of_resumes_at_the_same_moment_one_wins(tmp_path: Path) -> None:
    supervisor = Unmanned(tmp_path)
    run_id = supervisor.start(planned()).run_id
    supervisor.end(run_id, "failed", step=3)
    servers = [Unmanned(tmp_path) for _ in range(6)]

    got = at_once(6, lambda number: servers[number].resume(run_id))

    assert sum(isinstance(one, RunRow) for one in got) == 1
    assert sum(isinstance(one, InvalidInputError) for one in got) == 5
    assert sum(len(server.manned) for server in servers) == 1


def test_an_unknown_run_is_neither_resumed_nor_stopped(tmp_path: Path) -> None:
    supervisor = Unmanned(tmp_path)
    supervisor.start(planned())

    with pytest.raises(NotFoundError, match="No run 'run-1'"):
        supervisor.resume("run-1")
    with pytest.raises(NotFoundError, match="No run 'run-1'"):
        supervisor.stop("run-1", save=True)


# With workers


def test_a_run_at_work_is_not_resumed(paced: Supervisor) -> None:
    run_id = paced.start(planned(**LONG)).run_id
    reached(paced, run_id, 1)

    with pytest.raises(InvalidInputError, match="is running, at step"):
        paced.resume(run_id)

    paced.stop(run_id, save=False)
    ended(paced, run_id)


def test_a_stop_with_save_leaves_a_checkpoint_of_the_last_step(
    paced: Supervisor, paced_home: Path
) -> None:
    run_id = paced.start(planned(steps=400)).run_id
    reached(paced, run_id, 2)

    paced.stop(run_id, save=True)

    row = ended(paced, run_id)
    with RunStore(paced_home) as store:
        saved = store.checkpoints(run_id)
    assert (row.state, row.reason) == ("stopped", "user")
    assert [checkpoint.step for checkpoint in saved] == [row.step]
    until(lambda: not psutil.pid_exists(row.pid or 0), bound_s=30)


def test_a_stopped_run_goes_on_where_it_was(paced: Supervisor, paced_home: Path) -> None:
    run_id = paced.start(planned(steps=40)).run_id
    reached(paced, run_id, 2)
    paced.stop(run_id, save=True)
    stopped = ended(paced, run_id)
    before = losses(paced_home, run_id)

    paced.resume(run_id)

    completed(paced, run_id, paced_home)
    after = losses(paced_home, run_id)
    assert list(after) == list(range(1, 41))
    assert {step: after[step] for step in before} == before
    assert stopped.step == max(before) < 40


def test_a_stop_without_save_keeps_the_checkpoints_there_are(
    paced: Supervisor, paced_home: Path
) -> None:
    run_id = paced.start(planned(steps=400)).run_id
    reached(paced, run_id, 2)

    paced.stop(run_id, save=False)

    row = ended(paced, run_id)
    with RunStore(paced_home) as store:
        assert store.checkpoints(run_id) == []
    assert (row.state, row.reason) == ("stopped", "user")


def test_a_run_whose_worker_is_dead_is_stopped_at_once(paced: Supervisor) -> None:
    run_id = paced.start(planned(**LONG)).run_id
    reached(paced, run_id, 2)
    kill(paced, run_id)
    until(lambda: paced.run(run_id).state == "crashed", bound_s=15)
    step = paced.run(run_id).step

    row = paced.stop(run_id, save=True)

    assert (row.state, row.reason, row.step) == ("stopped", "user", step)
    assert row.detail == f"Its worker had died after step {step}; stop_run put an end to it."
    assert paced.stop(run_id, save=True) == row  # and stays so


def test_a_completed_run_is_trained_further(supervisor: Supervisor, runs_home: Path) -> None:
    run_id = supervisor.start(planned(steps=3)).run_id
    completed(supervisor, run_id, runs_home)

    supervisor.resume(run_id, steps=5)

    row = completed(supervisor, run_id, runs_home)
    assert row.step == 5
    assert list(losses(runs_home, run_id)) == [1, 2, 3, 4, 5]
    assert [state.split()[0] for state in state_events(runs_home, run_id)] == [
        *("starting", "running", "completed"),
        *("starting", "running", "completed"),
    ]


def test_a_worker_is_no_child_of_the_servers_session_and_leaves_no_zombie(
    paced: Supervisor,
) -> None:
    run_id = paced.start(planned(**LONG)).run_id
    worker = worker_of(paced.run(run_id))
    assert os.getsid(worker.pid) == worker.pid
    reached(paced, run_id, 1)

    worker.kill()

    until(lambda: not psutil.pid_exists(worker.pid), bound_s=10)
    paced.stop(run_id, save=False)
