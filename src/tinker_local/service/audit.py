"""What was done to what others may rely on, by UTC day.

```
<state dir>/audit/<day>.jsonl     one entry a line
```

Holds what leaves no other trace (a deleted checkpoint, a changed project). What is still there,
sessions, runs and checkpoints, tells of its own making.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from starlette.requests import Request


@dataclass(frozen=True)
class Entry:
    """One event, named `<resource>_<action>`."""

    timestamp: datetime
    event: str
    details: Mapping[str, object]


class AuditLog:
    """Adds entries and reads those of a day."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "audit"
        self._folder.mkdir(parents=True, exist_ok=True)

    def record(self, event: str, **details: object) -> None:
        now = datetime.now(UTC)
        line = {"timestamp": now.isoformat(), "event": event, "details": details}
        with self._file(now.date()).open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line))  # before it may stand half a line

    def of_day(self, day: date) -> list[Entry]:
        try:
            lines = self._file(day).read_text("utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [entry for line in lines if (entry := _entry(line)) is not None]

    def _file(self, day: date) -> Path:
        return self._folder / f"{day.isoformat()}.jsonl"


def audit_of(request: Request) -> AuditLog:
    log: AuditLog = request.app.state.audit
    return log


def _entry(line: str) -> Entry | None:
    """The entry on a line; None for one cut off by a kill."""
    try:
        stored = json.loads(line)
    except ValueError:
        return None
    return Entry(datetime.fromisoformat(stored["timestamp"]), stored["event"], stored["details"])
