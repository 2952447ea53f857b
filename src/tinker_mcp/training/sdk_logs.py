"""What the SDK logs, as far as it should be heard.

A tool's error says that a backend is gone; the SDK says so once more every 10 s for as long as
the process lives.
"""

from __future__ import annotations

import logging

_HEARTBEATS = "tinker.lib.internal_client_holder"


def tell_lost_heartbeats_once() -> None:
    """Let the first missed heartbeat of a session through, none after it. May be called again."""
    logger = logging.getLogger(_HEARTBEATS)
    if not any(isinstance(known, _OncePerSession) for known in logger.filters):
        logger.addFilter(_OncePerSession())


class _OncePerSession(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith("Session heartbeat failed"):
            return True
        session = message.partition(" for session ")[2].partition(". ")[0]
        is_news = session not in self._told
        self._told.add(session)
        return is_news
