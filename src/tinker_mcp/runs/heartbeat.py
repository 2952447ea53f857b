"""The sign of life of a worker, from a thread of its own: a long step never makes it look dead."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from tinker_mcp.errors import NotFoundError
from tinker_mcp.runs.journal import Journal
from tinker_mcp.runs.states import HEARTBEAT_S
from tinker_mcp.store.runs import LeaseLostError, RunStore

log = structlog.get_logger()

LEASE_LOST_STATUS = 3
_LOOK_S = 0.5


class Heartbeat:
    """Beats during a `with` block; ends this process at once where another worker has the run."""

    def __init__(self, home: Path, run_id: str, lease: str, journal: Journal) -> None:
        self._home, self._run_id, self._lease, self._journal = home, run_id, lease, journal
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(HEARTBEAT_S)

    def _beat_on(self) -> None:
        with RunStore(self._home) as store:
            self._guarded(self._beat, store)
            beaten_at = time.monotonic()
            while not self._is_over.wait(_LOOK_S):
                is_due = time.monotonic() - beaten_at >= HEARTBEAT_S
                self._guarded(self._beat if is_due else self._look, store)
                beaten_at = time.monotonic() if is_due else beaten_at

    def _beat(self, store: RunStore) -> None:
        self._journal.asked = store.beat(self._run_id, self._lease, os.getpid())

    def _look(self, store: RunStore) -> None:
        """Between two beats: a read is cheap, and a stop shall not cost many steps."""
        row = store.get(self._run_id)
        if row.lease != self._lease:
            raise LeaseLostError(f"{self._run_id} has another worker")
        self._journal.asked = row.stop_asked

    def _guarded(self, act: Callable[[RunStore], None], store: RunStore) -> None:
        try:
            act(store)
        except (LeaseLostError, NotFoundError):
            if not self._is_over.is_set():
                os._exit(LEASE_LOST_STATUS)  # whatever it is amid: nothing of it counts any more
        except Exception as error:  # a full disk, a locked database: the next beat may succeed
            log.warning("no_heartbeat", error=str(error))
