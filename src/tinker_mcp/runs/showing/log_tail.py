"""The end of a run's log, without the secrets that a library may have put there."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

_TAIL_BYTES = 256 * 1024
_HIDDEN = "[hidden]"
_SECRETS = (
    (re.compile(r"\btml-[A-Za-z0-9_\-]{6,}"), _HIDDEN),  # a key of the hosted service
    (re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"), _HIDDEN),  # user:password of an address
    (re.compile(r"(?i)(?<=bearer )[A-Za-z0-9._~+/\-]{8,}=*"), _HIDDEN),
    (
        re.compile(
            r"(?i)\b((?:[a-z0-9]+[_-])*(?:api[_-]?key|token|secret|password|signature)"
            r"[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;)}\]]{4,}"
        ),
        rf"\g<1>{_HIDDEN}",
    ),
    (re.compile(r"(?<![A-Za-z0-9])[0-9a-f]{40}(?![A-Za-z0-9])"), _HIDDEN),  # one of W&B
)


def tail(log: Path, lines: int, secrets: Collection[str] = ()) -> list[str]:
    """The last lines of a log; none where it does not exist yet.

    Args:
        secrets: Values to be hidden beside what looks like a key.
    """
    try:
        with log.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            end = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    whole = end.partition("\n")[2] if start else end
    return [redacted(line, secrets) for line in whole.splitlines()[-lines:]] if lines > 0 else []


def redacted(text: str, secrets: Collection[str] = ()) -> str:
    """The text without what is, or looks like, a key, token or password."""
    for secret in filter(None, secrets):
        text = text.replace(secret, _HIDDEN)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
