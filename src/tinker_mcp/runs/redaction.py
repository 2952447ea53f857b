"""A stream that tells no secret: the values of keys stay out of a run's log."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping
from typing import TextIO
from urllib.parse import urlsplit

from tinker_mcp.runs.showing.log_tail import redacted

_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
_MIN_CHARACTERS = 6  # a shorter one would hide parts of words


def secrets_in(environ: Mapping[str, str]) -> Collection[str]:
    """The values of variables that are named like a secret, and passwords in addresses."""
    named = {value for name, value in environ.items() if _NAMES.search(name)}
    passwords = {_password(value) for value in environ.values() if "://" in value and "@" in value}
    return {secret for secret in named | passwords if len(secret) >= _MIN_CHARACTERS}


def _password(url: str) -> str:
    try:
        return urlsplit(url).password or ""
    except ValueError:
        return ""


class Redacted(io.TextIOBase):
    """Writes to another stream, without the secrets of an environment."""

    def __init__(self, stream: TextIO, environ: Mapping[str, str]) -> None:
        self._stream = stream
        self._secrets = sorted(secrets_in(environ), key=len, reverse=True)

    def write(self, text: str) -> int:
        self._stream.write(self.hide(text))
        self._stream.flush()
        return len(text)

    def hide(self, text: str) -> str:
        """The text with its secrets hidden."""
        return redacted(text, self._secrets)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()
