"""How many tokens were trained and sampled, by hour, model and session.

```
<state dir>/usage/<day>.json      one row for each hour, kind, model and session of a UTC day
```

Counted in memory and written once a second, each file whole or not at all; a server that is
killed forgets at most the last second.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from starlette.requests import Request

from tinker_local.service.durable import write_json

UsageKind = Literal["training", "sampling_prefill", "sampling_prefill_cached", "sampling_sample"]
"""Tokens that went forward (and backward) in training; prompt tokens computed for sampling, or
taken from a cache; sampled tokens."""

_Key: TypeAlias = tuple[int, str, str, str]  # hour of the day, kind, model, session or ""


@dataclass(frozen=True)
class Used:
    """Tokens of one kind, model and session in the UTC hour that begins at `hour`."""

    hour: datetime
    kind: UsageKind
    base_model: str
    session_id: str | None
    tokens: int


class UsageLedger:
    """Counts tokens; may be called from any thread."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "usage"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._days: dict[date, Counter[_Key]] = {}
        self._unsaved: set[date] = set()
        self._since_start: Counter[str] = Counter()

    def add(self, kind: UsageKind, model: str, tokens: int, session_id: str | None = None) -> None:
        """Count `tokens` of a base model as used now."""
        now = datetime.now(UTC)
        with self._lock:
            self._day(now.date())[now.hour, kind, model, session_id or ""] += tokens
            self._unsaved.add(now.date())
            self._since_start[kind] += tokens

    def since_start(self) -> dict[str, int]:
        """Tokens of each kind since the server was started."""
        with self._lock:
            return {kind: self._since_start[kind] for kind in get_args(UsageKind)}

    def between(self, start: datetime, end: datetime) -> list[Used]:
        """What was used in the hours from `start` on and before `end`, both on the hour."""
        days = (end - start).days + 2
        with self._lock:
            rows = [
                row
                for number in range(days)
                for row in self._rows(start.astimezone(UTC).date() + timedelta(days=number))
            ]
        return [row for row in rows if start <= row.hour < end]

    def flush(self) -> None:
        """Write what is not on disk yet."""
        with self._lock:
            for day in self._unsaved:
                write_json(self._file(day), [[*key, n] for key, n in self._day(day).items()])
            self._unsaved.clear()

    def _rows(self, day: date) -> list[Used]:
        midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
        return [
            Used(
                midnight + timedelta(hours=hour),
                kind,  # type: ignore[arg-type]  # checked when it was added
                model,
                session_id or None,
                tokens,
            )
            for (hour, kind, model, session_id), tokens in self._day(day).items()
        ]

    def _day(self, day: date) -> Counter[_Key]:
        if day not in self._days:
            self._days[day] = self._read(day)
        return self._days[day]

    def _read(self, day: date) -> Counter[_Key]:
        try:
            rows = json.loads(self._file(day).read_text())
        except FileNotFoundError:
            return Counter()
        return Counter({(hour, kind, model, who): n for hour, kind, model, who, n in rows})

    def _file(self, day: date) -> Path:
        return self._folder / f"{day.isoformat()}.json"


def usage_of(request: Request) -> UsageLedger:
    """The server's ledger, for endpoints: `usage_of(request).add("training", model, tokens)`."""
    ledger: UsageLedger = request.app.state.usage
    return ledger
