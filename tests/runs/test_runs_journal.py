"""What a run writes down: store and files together, under the lease, and never twice."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from attempts import RUN_ID, Run, sentences, spec_of
from detached import checkpoint_lines, metric_lines

from tinker_mcp.errors import NotFoundError
from tinker_mcp.runs.journal import Journal
from tinker_mcp.store import database
from tinker_mcp.store.runs import FILE_NAME, LeaseLostError, RunStore


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, spec_of(sentences(), usd_per_million=0.5), sentences())


@pytest.fixture
def journal(run: Run) -> Journal:
    return run.journal()


def test_a_step_is_in_the_store_and_in_the_file(journal: Journal, run: Run) -> None:
    journal.step(1, {"train_mean_nll": 2.0})
    journal.close()

    assert run.losses() == [2.0]
    assert metric_lines(run.home, RUN_ID) == [(1, 2.0)]


def test_what_comes_again_after_a_rewind_is_there_once(journal: Journal, run: Run) -> None:
    for step in (1, 2, 3):
        journal.step(step, {"train_mean_nll": float(step)})
        journal.evaluation(step, {"test/nll": float(step)})
    journal.checkpoint(1, "state-1", "sampler-1", False)

    start = journal.rewind()
    journal.step(2, {"train_mean_nll": 20.0})
    journal.evaluation(2, {"test/nll": 20.0})
    journal.close()

    assert start is not None
    assert start.step == 1
    assert run.losses() == [1.0, 20.0]
    assert metric_lines(run.home, RUN_ID) == [(1, 1.0), (2, 20.0)]
    assert metric_lines(run.home, RUN_ID, "test/nll") == [(1, 1.0), (2, 20.0)]
    assert checkpoint_lines(run.home, RUN_ID) == [1]


def test_the_furthest_step_outlives_a_rewind(journal: Journal) -> None:
    journal.step(1, {"train_mean_nll": 1.0})
    journal.step(2, {"train_mean_nll": 1.0})
    journal.rewind()
    journal.close()

    assert journal.furthest_step == 2


def test_tokens_cost_what_the_spec_says_and_add_up_over_workers(run: Run) -> None:
    first = run.journal()
    first.spend(1_000_000)
    first.close()
    second = run.journal()
    second.spend(3_000_000)
    second.close()

    assert second.spent_usd == 2.0
    with RunStore(run.home) as store:
        assert (store.get(RUN_ID).tokens, store.get(RUN_ID).usd) == (4_000_000, 2.0)


def test_a_worker_that_was_replaced_writes_to_no_file(journal: Journal, run: Run) -> None:
    journal.step(1, {"train_mean_nll": 1.0})
    with RunStore(run.home) as store:
        assert store.take(RUN_ID, "another", None, before="lease")

    with pytest.raises(LeaseLostError):
        journal.step(2, {"train_mean_nll": 1.0})
    with pytest.raises(LeaseLostError):
        journal.checkpoint(2, "state", "sampler", False)
    with pytest.raises(LeaseLostError):
        journal.rewind()
    journal.close()

    assert metric_lines(run.home, RUN_ID) == [(1, 1.0)]
    assert not run.folder.checkpoints.exists()


def test_a_worker_waits_longer_than_others_for_a_store_that_is_held(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    journal, held_s = run.journal(), 0.5
    holder = sqlite3.connect(run.home / FILE_NAME, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    release = threading.Timer(held_s, holder.rollback)
    began = time.monotonic()
    release.start()

    journal.step(1, {"train_mean_nll": 2.0})

    assert time.monotonic() - began >= held_s
    assert run.losses() == [2.0]
    release.join()
    holder.close()
    journal.close()


def test_a_journal_opens_under_the_lease_of_the_run_alone(run: Run) -> None:
    with pytest.raises(LeaseLostError):
        Journal(run.home, RUN_ID, "another")
    with pytest.raises(NotFoundError):
        Journal(run.home, "run-none", "lease")


def test_lines_that_could_not_be_written_follow_in_their_order(journal: Journal, run: Run) -> None:
    run.folder.metrics.mkdir()
    journal.step(1, {"train_mean_nll": 1.0})
    journal.step(2, {"train_mean_nll": 2.0})
    assert run.warnings() == ["The run's files lag behind: Is a directory."]

    run.folder.metrics.rmdir()
    journal.step(3, {"train_mean_nll": 3.0})
    journal.close()

    assert metric_lines(run.home, RUN_ID) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(run.warnings()) == 1


def test_lines_that_could_not_be_written_follow_at_the_end_at_last(
    journal: Journal, run: Run
) -> None:
    run.folder.metrics.mkdir()
    journal.step(1, {"train_mean_nll": 1.0})
    run.folder.metrics.rmdir()
    journal.end("completed", None, "1 step.")
    journal.close()

    assert metric_lines(run.home, RUN_ID) == [(1, 1.0)]


def test_the_final_state_is_written_where_the_files_cannot_be(journal: Journal, run: Run) -> None:
    run.folder.metrics.mkdir()
    journal.step(1, {"train_mean_nll": 1.0})

    journal.end("completed", None, "1 step.")
    journal.close()

    with RunStore(run.home) as store:
        assert store.get(RUN_ID).state == "completed"


def test_a_state_that_stays_is_told_once(journal: Journal, run: Run) -> None:
    journal.running()
    journal.running()
    journal.waiting("The backend is busy.")
    journal.waiting("The backend is busy.")
    journal.running()
    journal.close()

    with RunStore(run.home) as store:
        told = [event.what for event in store.events(RUN_ID)]
    assert told == ["starting", "running", "waiting The backend is busy.", "running"]


def test_a_stop_that_was_asked_for_outweighs_a_sigterm(journal: Journal) -> None:
    assert journal.stop_asked is None
    journal.terminated = True
    assert journal.stop_asked == "save"
    journal.asked = "drop"
    assert journal.stop_asked == "drop"
    journal.close()


def test_a_checkpoint_line_is_one_the_cookbook_resumes_from(journal: Journal, run: Run) -> None:
    journal.checkpoint(3, "tinker://state", "tinker://sampler", True)
    journal.close()

    line = json.loads(run.folder.checkpoints.read_text())
    assert (line["batch"], line["state_path"]) == (3, "tinker://state")
    assert (line["sampler_path"], line["final"]) == ("tinker://sampler", True)
