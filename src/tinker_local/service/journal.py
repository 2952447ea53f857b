"""Sessions as they are remembered after their server has gone.

```
<state dir>/sessions/<session id>.jsonl     one line for each thing that happened, in order
```

A line is only ever added, so a server that is killed loses at most the one it was writing, which
is skipped when the file is read again. The file's time of change is when the client was last seen.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

FinishReason = Literal["success", "errored", "interrupted"]

DEFAULT_PROJECT = "default"
"""The project of a session that was given none."""


@dataclass(frozen=True)
class RecordedSampler:
    """What a sampling client sampled from; `model_path` is None for unsaved or base weights."""

    base_model: str
    model_path: str | None


@dataclass(frozen=True)
class Finish:
    """Why a session ended: "interrupted" where its client did not say so itself."""

    reason: FinishReason
    detail: str | None
    at: str


@dataclass
class SessionRecord:
    """All that is kept of a session; times are ISO 8601 in UTC."""

    session_id: str
    created_at: str
    user_metadata: Mapping[str, str]
    display_name: str | None = None
    project_id: str = DEFAULT_PROJECT
    model_ids: list[str] = field(default_factory=list)
    samplers: dict[str, RecordedSampler] = field(default_factory=dict)
    finish: Finish | None = None
    seen_at: str = ""


class SessionJournal:
    """The records of all sessions, and the files that keep them; None keeps them in memory."""

    def __init__(self, state_dir: Path | None = None) -> None:
        self._folder = None if state_dir is None else state_dir / "sessions"
        # The engine's thread adds samplers while the event loop adds sessions.
        self._lock = threading.Lock()
        self._records: dict[str, SessionRecord] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            found = (_read(file) for file in self._folder.glob("*.jsonl"))
            self._records = {record.session_id: record for record in found if record is not None}

    def get(self, session_id: str) -> SessionRecord | None:
        return self._records.get(session_id)

    def all(self) -> list[SessionRecord]:
        """Newest first; those of the same instant by id, so that pages do not overlap."""
        with self._lock:
            records = list(self._records.values())
        return sorted(records, key=place_in_listing, reverse=True)

    def open(
        self,
        session_id: str,
        user_metadata: Mapping[str, str],
        display_name: str | None,
        project_id: str | None,
    ) -> None:
        self._add(
            session_id,
            {
                "opened_at": _now(),
                "user_metadata": dict(user_metadata),
                "display_name": display_name,
                "project_id": project_id or DEFAULT_PROJECT,
            },
        )

    def add_model(self, session_id: str, model_id: str) -> None:
        self._add(session_id, {"model": model_id})

    def add_sampler(self, session_id: str, sampler_id: str, sampler: RecordedSampler) -> None:
        self._add(
            session_id,
            {
                "sampler": sampler_id,
                "base_model": sampler.base_model,
                "model_path": sampler.model_path,
            },
        )

    def move(self, session_id: str, project_id: str) -> None:
        self._add(session_id, {"project_id": project_id})

    def finish(self, session_id: str, reason: FinishReason, detail: str | None) -> None:
        self._add(session_id, {"finished": reason, "detail": detail, "at": _now()})

    def see(self, session_id: str) -> None:
        """Note that the client lives, without a line for each of its heartbeats."""
        self._records[session_id].seen_at = _now()
        if (file := self._file(session_id)) is not None:
            os.utime(file)

    def _add(self, session_id: str, line: dict[str, Any]) -> None:
        with self._lock:
            _apply(self._records, session_id, line)
            if (file := self._file(session_id)) is not None:
                with file.open("a", encoding="utf-8") as stream:
                    stream.write("\n" + json.dumps(line))  # before it may stand half a line

    def _file(self, session_id: str) -> Path | None:
        """A session's file; the id is one that the server made, so it cannot leave the folder."""
        return None if self._folder is None else self._folder / f"{session_id}.jsonl"


def place_in_listing(record: SessionRecord) -> tuple[datetime, str]:
    """What listings are sorted by, and what a cursor holds."""
    return datetime.fromisoformat(record.created_at), record.session_id


def _read(file: Path) -> SessionRecord | None:
    """The record in a file; None when not even its first line was written."""
    records: dict[str, SessionRecord] = {}
    for text in file.read_text("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a kill
            continue
        if records or "opened_at" in line:
            _apply(records, file.stem, line)
    record = records.get(file.stem)
    if record is not None:
        record.seen_at = datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat()
    return record


def _apply(records: dict[str, SessionRecord], session_id: str, line: Mapping[str, Any]) -> None:
    """Bring a record up to date by one line."""
    match line:
        case {"opened_at": at, "user_metadata": metadata, "display_name": name, "project_id": to}:
            records[session_id] = SessionRecord(session_id, at, metadata, name, to, seen_at=at)
        case {"model": model_id}:
            records[session_id].model_ids.append(model_id)
        case {"sampler": sampler_id, "base_model": base_model, "model_path": path}:
            records[session_id].samplers[sampler_id] = RecordedSampler(base_model, path)
        case {"finished": reason, "detail": detail, "at": at}:
            records[session_id].finish = Finish(reason, detail, at)
        case {"project_id": project_id}:
            records[session_id].project_id = project_id


def _now() -> str:
    return datetime.now(UTC).isoformat()
