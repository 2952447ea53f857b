"""The detached process of a run: what it records, what it leaves out, and how it ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from detached import (
    checkpoint_lines,
    completed,
    ended,
    losses,
    metric_lines,
    planned,
    reached,
    state_events,
    suspend_between_writes,
    until,
    worker_of,
)

from servers import LocalServer
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.redaction import Redacted, secrets_in
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings
from tinker_mcp.store.runs import FILE_NAME, RunStore

LONG: dict[str, Any] = {"steps": 400, "save_every": 4}
KEY = "tml-aKeyThatNobodyMayEverSee0123456789"


def warnings_of(home: Path, run_id: str) -> list[str]:
    with RunStore(home) as store:
        return [event.what for event in store.events(run_id) if event.kind == "warning"]


def test_a_run_in_a_process_of_its_own_comes_to_its_end(
    supervisor: Supervisor, runs_home: Path
) -> None:
    run_id = supervisor.start(planned(steps=6, save_every=2)).run_id

    row = completed(supervisor, run_id, runs_home)

    assert row.step == 6
    assert list(losses(runs_home, run_id)) == [1, 2, 3, 4, 5, 6]
    assert metric_lines(runs_home, run_id) == list(losses(runs_home, run_id).items())
    assert checkpoint_lines(runs_home, run_id) == [2, 4, 6]
    assert row.ended_at is not None


def test_sigterm_is_a_stop_with_a_checkpoint(paced: Supervisor, paced_home: Path) -> None:
    run_id = paced.start(planned(steps=400)).run_id
    row = reached(paced, run_id, 2)

    worker_of(row).terminate()

    row = ended(paced, run_id)
    assert (row.state, row.reason) == ("stopped", "user")
    assert checkpoint_lines(paced_home, run_id) == [row.step]


def test_a_worker_that_lost_its_lease_ends_and_writes_no_more(
    paced: Supervisor, paced_home: Path
) -> None:
    run_id = paced.start(planned(**LONG)).run_id
    row = reached(paced, run_id, 5)
    worker = worker_of(row)
    with RunStore(paced_home) as store:
        assert store.take(run_id, "another", None, before=row.lease)
        step = store.get(run_id).step

        until(lambda: not worker.is_running(), bound_s=15)

        assert store.get(run_id).step == step
        assert store.get(run_id).state == "starting"
        assert store.end_dead(run_id, "nobody", "The test is over.", before="another")


def test_a_worker_that_was_stuck_and_replaced_changes_nothing_when_it_wakes(
    paced: Supervisor, paced_home: Path
) -> None:
    run_id = paced.start(planned(steps=12, save_every=4)).run_id
    stuck = worker_of(reached(paced, run_id, 5))
    suspend_between_writes(stuck, paced_home)
    try:
        until(lambda: paced.run(run_id).state == "crashed", bound_s=15)
        assert "gave no sign of life for 10 s" in (paced.run(run_id).detail or "")
        paced.resume(run_id)
        reached(paced, run_id, 9)
    finally:
        stuck.resume()

    until(lambda: not stuck.is_running(), bound_s=15)
    completed(paced, run_id, paced_home)
    assert metric_lines(paced_home, run_id) == list(losses(paced_home, run_id).items())
    assert list(losses(paced_home, run_id)) == list(range(1, 13))
    assert checkpoint_lines(paced_home, run_id) == [4, 8, 12]


def test_data_that_was_changed_fails_the_run_with_a_sentence(
    paced: Supervisor, paced_home: Path
) -> None:
    run_id = paced.start(planned(**LONG)).run_id
    reached(paced, run_id, 5)
    paced.stop(run_id, save=True)
    ended(paced, run_id)
    data = RunFolder.of(paced_home, run_id).train_data
    data.write_bytes(data.read_bytes() + b" ")

    paced.resume(run_id)

    row = ended(paced, run_id)
    assert row.state == "failed"
    assert row.detail == f"Its data {str(data)!r} was changed since the run was started."


def test_a_step_that_fails_each_time_fails_the_run_and_only_the_log_has_the_traceback(
    supervisor: Supervisor, runs_home: Path
) -> None:
    run_id = supervisor.start(planned(base_model="tinker-local/none-such")).run_id

    row = ended(supervisor, run_id)

    assert row.state == "failed"
    assert row.detail is not None
    assert row.detail.startswith("3 times in a row: ")
    assert "none-such" in row.detail
    assert "Traceback" not in " ".join(state_events(runs_home, run_id))
    assert "Traceback" in RunFolder.of(runs_home, run_id).log.read_text()


def test_a_metrics_file_that_cannot_be_written_ends_no_run(
    supervisor: Supervisor, runs_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_the_way(self: RunFolder, *arguments: Any) -> None:
        create(self, *arguments)
        self.metrics.mkdir()

    create = RunFolder.create
    monkeypatch.setattr(RunFolder, "create", in_the_way)
    run_id = supervisor.start(planned(steps=4)).run_id

    completed(supervisor, run_id, runs_home)

    assert list(losses(runs_home, run_id)) == [1, 2, 3, 4]
    assert warnings_of(runs_home, run_id) == ["The run's files lag behind: Is a directory."]


def test_a_stop_is_heard_while_the_run_waits_for_a_backend_that_cannot_start(
    own_runs_home: Path,
) -> None:
    own_runs_home.mkdir()
    (own_runs_home / "local").write_text("no folder")  # so that no backend can start there
    supervisor = Supervisor(Settings(home=own_runs_home))
    run_id = supervisor.start(planned()).run_id
    until(lambda: supervisor.run(run_id).state == "waiting")
    assert "could not start" in (supervisor.run(run_id).detail or "")

    supervisor.stop(run_id, save=True)

    row = ended(supervisor, run_id)
    assert (row.state, row.reason) == ("stopped", "user")
    assert (row.detail or "").startswith("Stopped while it waited")
    until(lambda: not psutil.pid_exists(row.pid or 0), bound_s=15)


@pytest.mark.parametrize("way", ["completed", "failed"])
def test_no_key_is_in_argv_folder_log_or_database(
    own_runs_home: Path, runs_server: LocalServer, way: str
) -> None:
    key = runs_server.api_key
    settings = Settings(
        home=own_runs_home, backend="hosted", base_url=runs_server.base_url, api_key=key
    )
    environ = {**os.environ, "TINKER_MCP_LOG_LEVEL": "debug", "WANDB_API_KEY": KEY}
    changes = {} if way == "completed" else {"base_model": "tinker-local/none-such"}
    supervisor = Supervisor(settings, environ)
    run_id = supervisor.start(planned(steps=3, backend="hosted", **changes)).run_id
    worker = worker_of(supervisor.run(run_id))
    assert key not in " ".join(worker.cmdline())

    assert ended(supervisor, run_id).state == way

    until(lambda: not psutil.pid_exists(worker.pid), bound_s=20)
    files = [path for path in own_runs_home.rglob("*") if path.is_file()]
    assert {FILE_NAME, "logs.log", "config.json"} <= {path.name for path in files}
    found = [
        path for path in files for secret in (key, KEY) if secret.encode() in path.read_bytes()
    ]
    assert found == []


def test_secrets_are_found_by_the_names_of_their_variables() -> None:
    environ = {
        "WANDB_API_KEY": "0123456789",
        "HF_TOKEN": "hf_abcdefgh",
        "TINKER_BASE_URL": "https://user:pass-word@host/path",
        "SHORT_KEY": "on",
        "PATH": "/usr/bin",
    }

    assert set(secrets_in(environ)) == {"0123456789", "hf_abcdefgh", "pass-word"}


def test_a_redacted_stream_tells_no_secret(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        stream = Redacted(file, {"WANDB_API_KEY": "0123456789"})
        assert stream.write("logged in with 0123456789, fine\n") == 32

    assert (tmp_path / "log").read_text() == "logged in with [hidden], fine\n"
