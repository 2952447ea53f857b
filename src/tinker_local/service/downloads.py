"""Who may fetch which file without the API key: whoever holds the token made for it.

A token opens one file of one checkpoint for an hour. Tokens live in memory; a restart ends them.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tinker_local.errors import LocalError, NotFoundError
from tinker_local.service.checkpoints import Checkpoint

LIFETIME = timedelta(hours=1)
"""The SDK's CLI and the cookbook ask for new URLs five minutes before the old ones end."""


class ExpiredError(LocalError):
    """A token whose time has passed."""


@dataclass(frozen=True)
class Grant:
    """What a token opens."""

    checkpoint: Checkpoint
    file_name: str
    expires: datetime


class Grants:
    """All tokens given out."""

    def __init__(self, lifetime: timedelta = LIFETIME) -> None:
        self._lifetime = lifetime
        self._grants: dict[str, Grant] = {}

    def expiry(self) -> datetime:
        """When a token given now ends."""
        return datetime.now(UTC) + self._lifetime

    def give(self, checkpoint: Checkpoint, file_name: str, expires: datetime) -> str:
        """A new token, of 256 random bits."""
        self._forget_old()
        token = secrets.token_urlsafe(32)
        self._grants[token] = Grant(checkpoint, file_name, expires)
        return token

    def find(self, token: str, file_name: str) -> Grant:
        """What `token` opens, if that is the file of this name.

        Raises:
            NotFoundError: There is no such token, or it was made for another file.
            ExpiredError: Its time has passed.
        """
        grant = self._grants.get(token)
        if grant is None or grant.file_name != file_name:
            raise NotFoundError("No such download.", "Ask get_external_weights_urls for the URLs.")
        if grant.expires <= datetime.now(UTC):
            raise ExpiredError(
                f"This URL ended at {grant.expires.isoformat(timespec='seconds')}.",
                "Ask get_external_weights_urls for new ones.",
            )
        return grant

    def _forget_old(self) -> None:
        """Those that ended lately are kept, so that their holder is told why."""
        limit = datetime.now(UTC) - LIFETIME
        for token in [token for token, grant in self._grants.items() if grant.expires < limit]:
            del self._grants[token]
