"""Runs, their metrics, checkpoints and events.

A worker writes under a lease: once a newer worker has taken the run over, every write of the older
one raises LeaseLostError and changes nothing. NaN and infinities are kept (JSON as Python has it).
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinker_mcp.errors import NotFoundError, StoreBusyError
from tinker_mcp.store import database
from tinker_mcp.store.rows import (
    CheckpointRow,
    EventKind,
    EventRow,
    MetricKind,
    MetricRow,
    RunRow,
    StopAsked,
)

FILE_NAME = "runs.sqlite3"


class LeaseLostError(Exception):
    """Another worker has taken the run over; this one must end."""


class RunStore:
    """The runs of one home. Not for several threads: each opens its own.

    All that writes raises StoreBusyError where another process holds the database for too long.
    """

    def __init__(self, home: Path, *, wait_s: float | None = None) -> None:
        """Open it, to wait `wait_s` at most for another's write: 10 s by default."""
        wait_s = database.BUSY_TIMEOUT_S if wait_s is None else wait_s
        self._connection = database.connect(home / FILE_NAME, wait_s)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Whoever starts, watches and stops runs

    def add(
        self,
        run_id: str,
        spec: str,
        idempotency_key: str | None = None,
        *,
        arguments: str | None = None,
        warnings: Sequence[str] = (),
    ) -> RunRow:
        """Keep a new run, in state `starting`; the one of the same key where there is one.

        Args:
            arguments: What its start was asked for, as JSON.
            warnings: What is to be known of it from the beginning.
        """
        now = time.time()
        with self._writing():
            added = self._connection.execute(
                "INSERT INTO runs (run_id, spec, state, created_at, heartbeat_at, idempotency_key,"
                " arguments) VALUES (?, ?, 'starting', ?, ?, ?, ?)"
                " ON CONFLICT (idempotency_key) DO NOTHING",
                (run_id, spec, now, now, idempotency_key, arguments),
            ).rowcount
            for warning in warnings if added else ():
                self._insert_event(run_id, "warning", warning)
        known = self.by_key(idempotency_key) if idempotency_key else None
        return known or self.get(run_id)

    def get(self, run_id: str) -> RunRow:
        """One run.

        Raises:
            NotFoundError: There is none of this id.
        """
        row = self._connection.execute("SELECT * FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if row is None:
            newest = ", ".join(run.run_id for run in self.newest(3)) or "there is none yet"
            raise NotFoundError(
                f"No run {run_id!r}; the newest: {newest}.",
                next_step="Call list_runs, or start_run to start one.",
            )
        return RunRow(**row)

    def by_key(self, idempotency_key: str) -> RunRow | None:
        """The run that was started with this key."""
        row = self._connection.execute(
            "SELECT * FROM runs WHERE idempotency_key = ?", (idempotency_key,)
        ).fetchone()
        return None if row is None else RunRow(**row)

    def newest(self, limit: int = -1) -> list[RunRow]:
        """Runs, the newest first; all of them by default."""
        rows = self._connection.execute(
            "SELECT * FROM runs ORDER BY created_at DESC, run_id LIMIT ?", (limit,)
        )
        return [RunRow(**row) for row in rows]

    def ask_to_stop(self, run_id: str, how: StopAsked | None) -> None:
        """Have its worker stop after the steps that are on their way; None takes it back."""
        with self._writing():
            self._connection.execute(
                "UPDATE runs SET stop_asked = ? WHERE run_id = ?", (how, run_id)
            )

    def set_spec(self, run_id: str, spec: str) -> None:
        """Replace what a run does: a resumed one may get more steps or money."""
        with self._writing():
            self._connection.execute("UPDATE runs SET spec = ? WHERE run_id = ?", (spec, run_id))

    def take(
        self,
        run_id: str,
        lease: str,
        pid: int | None,
        *,
        before: str | None,
        spec: str | None = None,
    ) -> bool:
        """Give a run to a new worker, if `before` still is its lease; with `spec`, a changed one.

        Metrics after its last checkpoint are dropped with it: they will come again. Its state is
        `starting` then, and what ended it is forgotten.

        Returns:
            Whether it was given.
        """
        now = time.time()
        with self._writing():
            taken = self._connection.execute(
                "UPDATE runs SET lease = ?, pid = ?, state = 'starting', reason = NULL,"
                " detail = NULL, stop_asked = NULL, started_at = ?, ended_at = NULL,"
                " heartbeat_at = ?, spec = COALESCE(?, spec) WHERE run_id = ? AND lease IS ?",
                (lease, pid, now, now, spec, run_id, before),
            ).rowcount
            if taken:
                self._rewind(run_id)
                self._insert_event(run_id, "state", "starting")
        return bool(taken)

    def end_dead(self, run_id: str, lease: str, detail: str, *, before: str | None) -> bool:
        """Write `stopped (user)` for a run without a living worker, if `before` is its lease.

        `lease` takes its place, so that a worker that was only stuck writes no more.

        Returns:
            Whether it was written.
        """
        now = time.time()
        with self._writing():
            ended = self._connection.execute(
                "UPDATE runs SET lease = ?, state = 'stopped', reason = 'user', detail = ?,"
                " ended_at = ? WHERE run_id = ? AND lease IS ?"
                " AND state IN ('starting', 'running', 'waiting')",
                (lease, detail, now, run_id, before),
            ).rowcount
            if ended:
                self._insert_event(run_id, "state", f"stopped (user) {detail}")
        return bool(ended)

    # Its worker

    @contextlib.contextmanager
    def under(self, run_id: str, lease: str) -> Iterator[None]:
        """One transaction for all that is written in this block, under the lease.

        Nobody can take the run over meanwhile, so what the block writes to the run's files is
        safe from another worker, too.

        Raises:
            LeaseLostError: Another worker has the run.
        """
        with self._writing():
            row: Any = self._connection.execute(
                "SELECT lease FROM runs WHERE run_id = ?", (run_id,)
            ).fetchone()
            if row is None or row["lease"] != lease:
                raise LeaseLostError(f"{run_id} has another worker")
            yield

    def rewind(self, run_id: str, lease: str) -> CheckpointRow | None:
        """Go back to the last checkpoint, as `take` does, under the same lease; that checkpoint.

        Without one even the numbers of step 0 are dropped.
        """
        with self.under(run_id, lease):
            self._rewind(run_id)
        saved = self.checkpoints(run_id)
        return saved[-1] if saved else None

    def beat(self, run_id: str, lease: str, pid: int) -> StopAsked | None:
        """Give a sign of life; answers whether somebody asked to stop."""
        with self.under(run_id, lease):
            self._connection.execute(
                "UPDATE runs SET heartbeat_at = ?, pid = ? WHERE run_id = ?",
                (time.time(), pid, run_id),
            )
        return self.get(run_id).stop_asked

    def move(
        self,
        run_id: str,
        lease: str,
        state: str,
        *,
        reason: str | None = None,
        detail: str | None = None,
    ) -> None:
        """Write a new state, with an event. `ended_at` is set unless it is an active one."""
        now = time.time()
        is_active = state in ("starting", "running", "waiting")
        with self.under(run_id, lease):
            self._connection.execute(
                "UPDATE runs SET state = ?, reason = ?, detail = ?, heartbeat_at = ?,"
                " ended_at = ? WHERE run_id = ?",
                (state, reason, detail, now, None if is_active else now, run_id),
            )
            what = " ".join(word for word in (state, reason and f"({reason})", detail) if word)
            self._insert_event(run_id, "state", what)

    def spend(self, run_id: str, lease: str, tokens: int, usd: float) -> None:
        """Count tokens that are about to be submitted: before, so that none is ever forgotten."""
        with self.under(run_id, lease):
            self._connection.execute(
                "UPDATE runs SET tokens = tokens + ?, usd = usd + ? WHERE run_id = ?",
                (tokens, usd, run_id),
            )

    def record(
        self, run_id: str, lease: str, kind: MetricKind, step: int, numbers: Mapping[str, float]
    ) -> None:
        """Write the numbers of a step, over those of an earlier time; `train` moves the run on."""
        with self.under(run_id, lease):
            self._connection.execute(
                "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?)",
                (run_id, kind, step, time.time(), json.dumps(dict(numbers))),
            )
            if kind == "train":
                self._connection.execute(
                    "UPDATE runs SET step = ? WHERE run_id = ?", (step, run_id)
                )

    def record_checkpoint(
        self, run_id: str, lease: str, step: int, state_path: str, sampler_path: str, is_final: bool
    ) -> None:
        """Write what a resume begins with."""
        with self.under(run_id, lease):
            self._connection.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?)",
                (run_id, step, time.time(), state_path, sampler_path, is_final),
            )

    def tell(self, run_id: str, lease: str, kind: EventKind, what: str) -> None:
        """Keep an event."""
        with self.under(run_id, lease):
            self._insert_event(run_id, kind, what)

    # Everybody

    def metrics(self, run_id: str, kind: MetricKind, after: int = -1) -> list[MetricRow]:
        """By step, those after `after`, up to the one that the run is at."""
        rows = self._connection.execute(
            "SELECT kind, step, at, numbers FROM metrics WHERE run_id = ? AND kind = ?"
            " AND step > ? ORDER BY step",
            (run_id, kind, after),
        )
        return [MetricRow(r["kind"], r["step"], r["at"], json.loads(r["numbers"])) for r in rows]

    def checkpoints(self, run_id: str) -> list[CheckpointRow]:
        """By step."""
        rows = self._connection.execute(
            "SELECT step, at, state_path, sampler_path, is_final FROM checkpoints"
            " WHERE run_id = ? ORDER BY step",
            (run_id,),
        )
        return [CheckpointRow(**{**row, "is_final": bool(row["is_final"])}) for row in rows]

    def events(self, run_id: str, after: int = 0) -> list[EventRow]:
        """In order of time, those with a higher id than `after`."""
        rows = self._connection.execute(
            "SELECT event_id, at, kind, what FROM events WHERE run_id = ? AND event_id > ?"
            " ORDER BY event_id",
            (run_id, after),
        )
        return [EventRow(**row) for row in rows]

    def _rewind(self, run_id: str) -> None:
        saved = self._connection.execute(
            "SELECT MAX(step) FROM checkpoints WHERE run_id = ?", (run_id,)
        ).fetchone()[0]
        self._connection.execute("UPDATE runs SET step = ? WHERE run_id = ?", (saved or 0, run_id))
        self._connection.execute(
            "DELETE FROM metrics WHERE run_id = ? AND step > ?",
            (run_id, -1 if saved is None else saved),
        )

    def _insert_event(self, run_id: str, kind: EventKind, what: str) -> None:
        self._connection.execute(
            "INSERT INTO events (run_id, at, kind, what) VALUES (?, ?, ?, ?)",
            (run_id, time.time(), kind, what),
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction, or the one that is open already."""
        if self._connection.in_transaction:
            yield
            return
        self._begin()
        try:
            yield
            self._connection.execute("COMMIT")  # which may fail, too: the disk may be full
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _begin(self) -> None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # the rest says why it is
                raise
            raise StoreBusyError(
                "Another process holds the database of runs, where a write takes milliseconds.",
                next_step="Call again. Where that fails too, a worker may be suspended amid a "
                "write: stop_run or resume_run of a run that list_runs calls crashed ends it.",
            ) from error


def exists(home: Path) -> bool:
    """Whether there is a store at all; reading tools make none."""
    return (home / FILE_NAME).exists()
