"""Opening the database, and bringing an older one up to date."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from tinker_mcp.errors import InvalidInputError

BUSY_TIMEOUT_S = 10.0  # writes take milliseconds; whoever holds the lock longer is stuck
_AGAIN_S = 0.02

MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE runs (
        run_id TEXT PRIMARY KEY,
        spec TEXT NOT NULL,
        state TEXT NOT NULL,
        reason TEXT,
        detail TEXT,
        step INTEGER NOT NULL DEFAULT 0,
        created_at REAL NOT NULL,
        started_at REAL,
        ended_at REAL,
        idempotency_key TEXT UNIQUE,
        lease TEXT,
        pid INTEGER,
        heartbeat_at REAL NOT NULL,
        stop_asked TEXT,
        tokens INTEGER NOT NULL DEFAULT 0,
        usd REAL NOT NULL DEFAULT 0
    );
    CREATE TABLE metrics (
        run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
        kind TEXT NOT NULL,
        step INTEGER NOT NULL,
        at REAL NOT NULL,
        numbers TEXT NOT NULL,
        PRIMARY KEY (run_id, kind, step)
    ) WITHOUT ROWID;
    CREATE TABLE checkpoints (
        run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
        step INTEGER NOT NULL,
        at REAL NOT NULL,
        state_path TEXT NOT NULL,
        sampler_path TEXT NOT NULL,
        is_final INTEGER NOT NULL,
        PRIMARY KEY (run_id, step)
    ) WITHOUT ROWID;
    CREATE TABLE events (
        event_id INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
        at REAL NOT NULL,
        kind TEXT NOT NULL,
        what TEXT NOT NULL
    );
    CREATE INDEX events_of_run ON events (run_id);
    """,
    "ALTER TABLE runs ADD COLUMN arguments TEXT",
)


def connect(path: Path, wait_s: float) -> sqlite3.Connection:
    """A connection to the database at `path`, made or migrated where it must be.

    A transaction waits `wait_s` at most for another to end. Transactions begin by hand
    (`BEGIN IMMEDIATE`). Close it in the thread that opened it.

    Raises:
        InvalidInputError: A newer version of this program wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    connection = sqlite3.connect(path, timeout=wait_s, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = NORMAL")  # whole after a kill; in WAL mode also
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch a new database to a write-ahead log. SQLite itself does not wait for others here."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_AGAIN_S)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    if _version(connection) == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection)  # another process may have been first
        if version > len(MIGRATIONS):
            raise InvalidInputError(
                f"{path} has version {version}; this program knows {len(MIGRATIONS)}.",
                next_step="Upgrade tinker-mcp, or set TINKER_MCP_HOME to another folder.",
            )
        for script in MIGRATIONS[version:]:
            for statement in script.split(";"):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
