"""Promised results: made when a request is accepted, fetched by long poll.

A request's id is derived from what identifies it to the client (model and seq_id, sampler and
seq_id), so a submission that is retried after a lost answer meets its own future again.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import structlog

from tinker_local.errors import LocalError

log = structlog.get_logger()

KEEP_S = 900.0
"""Seconds a finished result stays fetchable; the SDK fetches again when an answer was lost."""


@dataclass(frozen=True)
class Reply:
    """A result as it goes over the wire."""

    body: bytes
    content_type: str


@dataclass(frozen=True)
class Failure:
    """Why there is no result: `category` is "user" or "server"."""

    error: str
    category: str


@dataclass
class Future:
    """One promised result."""

    request_id: str
    session_id: str
    outcome: Reply | Failure | None = None
    is_cancelled: bool = False
    finished_at: float | None = None
    _done: asyncio.Event = field(default_factory=asyncio.Event)

    def resolve(self, outcome: Reply | Failure) -> None:
        """Settle it, once; call on the event loop's thread."""
        if self.outcome is None:
            self.outcome = outcome
            self.finished_at = time.monotonic()
            self._done.set()

    async def wait(self, timeout_s: float) -> Reply | Failure | None:
        """Its outcome, or None if it has none within `timeout_s`."""
        # The SDK asks again after 45 s, so one future can have several waiters at once.
        try:
            await asyncio.wait_for(self._done.wait(), timeout_s)
        except TimeoutError:
            return None
        return self.outcome


class FutureStore:
    """All futures by request id."""

    def __init__(self) -> None:
        self._futures: dict[str, Future] = {}

    def get(self, request_id: str) -> Future | None:
        return self._futures.get(request_id)

    def create(self, request_id: str, session_id: str) -> Future:
        """A new future; the id must be unused."""
        self._sweep()
        future = self._futures[request_id] = Future(request_id, session_id)
        return future

    def drop_session(self, session_id: str) -> None:
        """Forget the futures of a session that has ended; their waiters are told."""
        for future in [f for f in self._futures.values() if f.session_id == session_id]:
            future.is_cancelled = True
            future.resolve(Failure("The session was finished before this request ran.", "user"))
            del self._futures[future.request_id]

    def fail_pending(self, error: str) -> None:
        """Cancel what has no outcome yet and tell its waiters `error`."""
        for future in self._futures.values():
            if future.outcome is None:
                future.is_cancelled = True
                future.resolve(Failure(error, "server"))

    def _sweep(self) -> None:
        limit = time.monotonic() - KEEP_S
        old = [f for f in self._futures.values() if f.finished_at and f.finished_at < limit]
        for future in old:
            del self._futures[future.request_id]


def failure(error: Exception) -> Failure:
    """How an exception is told to the client; an unforeseen one is logged in full."""
    if isinstance(error, LocalError):
        return Failure(str(error), "user")
    log.error("request_failed", exc_info=error)
    return Failure(f"tinker-local failed: {type(error).__name__}: {error}", "server")
