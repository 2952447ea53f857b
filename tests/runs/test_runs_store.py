"""The store of runs: leases, keys, rows that come again, and processes that share it."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinker_mcp.errors import InvalidInputError, NotFoundError, StoreBusyError
from tinker_mcp.store import database
from tinker_mcp.store.runs import FILE_NAME, LeaseLostError, RunStore, exists

SPEC = '{"method": "sft"}'
# Writes for a while as a worker would, then prints how often.
WRITER = """
import sys, time
from pathlib import Path
from tinker_mcp.store.runs import RunStore

home, run_id, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with RunStore(home) as store:
    store.add(run_id, "{}")
    assert store.take(run_id, run_id, None, before=None)
    end, step = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        step += 1
        store.record(run_id, run_id, "train", step, {"train_mean_nll": 1.0})
        store.beat(run_id, run_id, 1)
print(step)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore(tmp_path) as opened:
        yield opened


@pytest.fixture
def leased(store: RunStore) -> RunStore:
    """A store with a run `run-1` that the worker `first` holds."""
    store.add("run-1", SPEC)
    assert store.take("run-1", "first", 11, before=None)
    return store


def test_a_new_run_is_starting_and_has_no_worker(store: RunStore) -> None:
    row = store.add("run-1", SPEC)

    assert (row.state, row.lease, row.pid, row.step, row.tokens) == ("starting", None, None, 0, 0)
    assert store.get("run-1") == row


def test_an_unknown_run_is_told_with_those_there_are(store: RunStore) -> None:
    store.add("run-1", SPEC)

    with pytest.raises(NotFoundError, match=r"No run 'run-2'; the newest: run-1\."):
        store.get("run-2")


def test_the_same_key_twice_is_one_run(store: RunStore) -> None:
    first = store.add("run-1", SPEC, "key")

    assert store.add("run-2", SPEC, "key") == first
    assert store.by_key("key") == first
    assert [row.run_id for row in store.newest()] == ["run-1"]


def test_runs_without_a_key_are_each_their_own(store: RunStore) -> None:
    store.add("run-1", SPEC)
    store.add("run-2", SPEC)

    assert {row.run_id for row in store.newest()} == {"run-1", "run-2"}


def test_of_two_that_take_a_run_one_gets_it(leased: RunStore) -> None:
    assert leased.take("run-1", "second", 12, before="first")
    assert not leased.take("run-1", "third", 13, before="first")

    assert (leased.get("run-1").lease, leased.get("run-1").pid) == ("second", 12)


def test_a_worker_that_lost_its_lease_writes_nothing_any_more(leased: RunStore) -> None:
    leased.take("run-1", "second", 12, before="first")
    before = leased.get("run-1"), leased.events("run-1")

    for write in (
        lambda: leased.beat("run-1", "first", 11),
        lambda: leased.move("run-1", "first", "completed"),
        lambda: leased.spend("run-1", "first", 10, 1.0),
        lambda: leased.record("run-1", "first", "train", 1, {"train_mean_nll": 1.0}),
        lambda: leased.record_checkpoint("run-1", "first", 1, "state", "sampler", False),
        lambda: leased.tell("run-1", "first", "note", "late"),
        lambda: leased.rewind("run-1", "first"),
    ):
        with pytest.raises(LeaseLostError):
            write()

    assert (leased.get("run-1"), leased.events("run-1")) == before
    assert leased.metrics("run-1", "train") == []
    assert leased.checkpoints("run-1") == []


def test_a_step_that_comes_again_overwrites_its_row(leased: RunStore) -> None:
    leased.record("run-1", "first", "train", 1, {"train_mean_nll": 2.0})
    leased.record("run-1", "first", "train", 1, {"train_mean_nll": 1.5})

    assert [(row.step, row.numbers) for row in leased.metrics("run-1", "train")] == [
        (1, {"train_mean_nll": 1.5})
    ]


def test_numbers_that_are_none_are_kept(leased: RunStore) -> None:
    leased.record("run-1", "first", "train", 1, {"train_mean_nll": math.nan, "grad": math.inf})

    numbers = leased.metrics("run-1", "train")[0].numbers
    assert math.isnan(numbers["train_mean_nll"])
    assert numbers["grad"] == math.inf


def test_evaluations_do_not_move_the_run_on(leased: RunStore) -> None:
    leased.record("run-1", "first", "train", 1, {"train_mean_nll": 2.0})
    leased.record("run-1", "first", "eval", 5, {"test/nll": 2.0})

    assert leased.get("run-1").step == 1


def test_a_new_worker_begins_after_the_last_checkpoint(leased: RunStore) -> None:
    for step in (1, 2, 3, 4):
        leased.record("run-1", "first", "train", step, {"train_mean_nll": 1.0})
        leased.record("run-1", "first", "eval", step, {"test/nll": 1.0})
    leased.record_checkpoint("run-1", "first", 2, "state-2", "sampler-2", False)
    leased.move("run-1", "first", "failed", detail="The disk is full.")
    leased.ask_to_stop("run-1", "save")

    assert leased.take("run-1", "second", None, before="first")

    row = leased.get("run-1")
    assert (row.state, row.step, row.reason, row.detail) == ("starting", 2, None, None)
    assert (row.ended_at, row.stop_asked) == (None, None)
    assert [m.step for m in leased.metrics("run-1", "train")] == [1, 2]
    assert [m.step for m in leased.metrics("run-1", "eval")] == [1, 2]


def test_without_a_checkpoint_all_numbers_come_again(leased: RunStore) -> None:
    leased.record("run-1", "first", "eval", 0, {"test/nll": 3.0})
    leased.record("run-1", "first", "train", 1, {"train_mean_nll": 2.0})

    assert leased.rewind("run-1", "first") is None

    assert leased.get("run-1").step == 0
    assert leased.metrics("run-1", "eval") == []
    assert leased.metrics("run-1", "train") == []


def test_a_rewind_goes_back_to_the_last_checkpoint_under_the_same_lease(leased: RunStore) -> None:
    leased.record("run-1", "first", "train", 1, {"train_mean_nll": 2.0})
    leased.record_checkpoint("run-1", "first", 1, "state-1", "sampler-1", False)
    leased.record("run-1", "first", "train", 2, {"train_mean_nll": 1.0})

    start = leased.rewind("run-1", "first")

    assert start is not None
    assert (start.step, start.state_path, start.is_final) == (1, "state-1", False)
    assert leased.get("run-1").step == 1
    assert [m.step for m in leased.metrics("run-1", "train")] == [1]


def test_what_is_spent_adds_up_over_workers(leased: RunStore) -> None:
    leased.spend("run-1", "first", 100, 0.25)
    leased.take("run-1", "second", None, before="first")
    leased.spend("run-1", "second", 50, 0.125)

    assert (leased.get("run-1").tokens, leased.get("run-1").usd) == (150, 0.375)


def test_a_changed_spec_comes_with_the_lease(leased: RunStore) -> None:
    assert not leased.take("run-1", "second", None, before="nobody", spec='{"steps": 9}')
    assert leased.get("run-1").spec == SPEC

    assert leased.take("run-1", "second", None, before="first", spec='{"steps": 9}')
    assert leased.get("run-1").spec == '{"steps": 9}'


def test_a_dead_run_is_ended_once_and_its_worker_writes_no_more(leased: RunStore) -> None:
    assert leased.end_dead("run-1", "nobody", "It had died.", before="first")
    assert not leased.end_dead("run-1", "nobody", "It had died.", before="nobody")

    row = leased.get("run-1")
    assert (row.state, row.reason, row.detail) == ("stopped", "user", "It had died.")
    with pytest.raises(LeaseLostError):
        leased.beat("run-1", "first", 11)


def test_a_heartbeat_hears_that_the_run_shall_stop(leased: RunStore) -> None:
    assert leased.beat("run-1", "first", 11) is None
    leased.ask_to_stop("run-1", "drop")
    assert leased.beat("run-1", "first", 11) == "drop"


def test_an_end_has_a_time_and_an_event(leased: RunStore) -> None:
    leased.move("run-1", "first", "running")
    assert leased.get("run-1").ended_at is None

    leased.move("run-1", "first", "stopped", reason="budget", detail="$1.00 are spent.")

    assert leased.get("run-1").ended_at is not None
    told = [event.what for event in leased.events("run-1")]
    assert told == ["starting", "running", "stopped (budget) $1.00 are spent."]


def test_a_block_under_a_lease_is_written_whole_or_not_at_all(leased: RunStore) -> None:
    class PowerCut(Exception):
        pass

    with pytest.raises(PowerCut), leased.under("run-1", "first"):
        leased.record("run-1", "first", "train", 1, {"train_mean_nll": 2.0})
        raise PowerCut

    assert leased.metrics("run-1", "train") == []
    leased.record("run-1", "first", "train", 1, {"train_mean_nll": 2.0})  # and it goes on
    assert leased.get("run-1").step == 1


def test_a_store_that_is_not_there_is_made_by_writers_only(tmp_path: Path) -> None:
    assert not exists(tmp_path)
    RunStore(tmp_path).close()
    assert exists(tmp_path)


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    RunStore(tmp_path).close()
    newer = len(database.MIGRATIONS) + 1
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute(f"PRAGMA user_version = {newer}")
    connection.close()

    with pytest.raises(InvalidInputError, match=rf"has version {newer}; .*Upgrade tinker-mcp"):
        RunStore(tmp_path)


def test_an_older_database_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunStore(tmp_path) as old:
        old.add("run-1", SPEC)
    added = "CREATE TABLE notes (text TEXT); INSERT INTO notes VALUES ('new')"
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, added))

    with RunStore(tmp_path) as store:
        assert store.get("run-1").spec == SPEC
    with database.connect(tmp_path / FILE_NAME, 1.0) as connection:
        assert [row["text"] for row in connection.execute("SELECT text FROM notes")] == ["new"]
    connection.close()


def test_a_migration_that_fails_leaves_the_database_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunStore(tmp_path).close()
    broken = "CREATE TABLE notes (text TEXT); INSERT INTO nowhere VALUES (1)"
    known = database.MIGRATIONS
    monkeypatch.setattr(database, "MIGRATIONS", (*known, broken))
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        RunStore(tmp_path)

    monkeypatch.setattr(database, "MIGRATIONS", known)
    with RunStore(tmp_path) as store:
        assert store.newest() == []


def test_stores_that_are_made_at_the_same_moment_are_one(tmp_path: Path) -> None:
    ready = threading.Barrier(8)
    failures: list[BaseException] = []

    def add(number: int) -> None:
        ready.wait()
        try:
            with RunStore(tmp_path) as store:
                store.add(f"run-{number}", SPEC)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    with RunStore(tmp_path) as store:
        assert len(store.newest()) == 8


def test_of_several_that_add_a_key_at_the_same_moment_one_makes_the_run(tmp_path: Path) -> None:
    ready = threading.Barrier(8)
    found: list[str] = []

    def add(number: int) -> None:
        with RunStore(tmp_path) as store:
            ready.wait()
            found.append(store.add(f"run-{number}", SPEC, "key").run_id)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert len(set(found)) == 1


def test_processes_that_write_at_once_do_not_lock_each_other_out(tmp_path: Path) -> None:
    names = ("run-1", "run-2", "run-3")
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name, "4"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    said = [writer.communicate(timeout=60) for writer in writers]

    assert [errors for _, errors in said] == ["", "", ""]  # no "database is locked"
    with RunStore(tmp_path) as store:
        assert [store.get(name).step for name in names] == [int(steps) for steps, _ in said]
    assert min(int(steps) for steps, _ in said) > 10


def test_a_reader_is_not_held_up_by_a_writer(leased: RunStore, tmp_path: Path) -> None:
    with leased.under("run-1", "first"):
        leased.record("run-1", "first", "train", 1, {"train_mean_nll": 2.0})
        with RunStore(tmp_path) as other:
            assert other.get("run-1").step == 0

    assert leased.get("run-1").step == 1


def test_a_writer_that_waits_too_long_is_told_apart(
    leased: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    with (
        RunStore(tmp_path) as other,
        leased.under("run-1", "first"),
        pytest.raises(StoreBusyError, match="stop_run or resume_run of a run that"),
    ):
        other.ask_to_stop("run-1", "save")
