"""Saved weights by name: where they lie, what is known of them, which exist.

```
<state dir>/runs/<run>/run.json
                      /weights/<name>/          checkpoint.json + what the engine wrote
                      /sampler_weights/<name>/
           /ephemeral/<sampler>/                weights of unnamed samplers, gone at the next start
           /unfinished/                         being written; never listed, emptied at each start
```

A checkpoint is written beside and renamed, so it is either whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tinker_local.errors import NotFoundError, UserInputError
from tinker_local.ops import LoraSpec

TYPES = {"weights": "training", "sampler_weights": "sampler"}
"""The middle part of a tinker:// path, and the SDK's name for that type of checkpoint."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}:train:\d{1,9}")
_PATH = re.compile(r"tinker://([^/]+)/([^/]+)/([^/]+)")


@dataclass(frozen=True)
class Run:
    """A training client as it is remembered after its server has gone."""

    run_id: str
    base_model: str
    lora: LoraSpec
    created_at: str
    user_metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One saved set of weights; `kind` is a key of TYPES; times are ISO 8601 in UTC."""

    run_id: str
    kind: str
    name: str
    created_at: str
    size_bytes: int
    expires_at: str | None
    user_metadata: Mapping[str, str] | None

    @property
    def path(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    @property
    def is_expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC).isoformat()


@dataclass(frozen=True)
class NewCheckpoint:
    """What a save asks for."""

    run_id: str
    kind: str
    name: str
    ttl_s: int | None = None
    user_metadata: Mapping[str, str] | None = None
    overwrite: bool = False


class Catalog:
    """The checkpoints under one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._runs = state_dir / "runs"
        self._unfinished = state_dir / "unfinished"
        self._ephemeral = state_dir / "ephemeral"
        for folder in (self._unfinished, self._ephemeral):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self._runs, self._unfinished, self._ephemeral):
            folder.mkdir(parents=True, exist_ok=True)

    def add_run(self, run: Run) -> None:
        folder = self._run_folder(run.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "run.json", asdict(run))

    def run(self, run_id: str) -> Run:
        """What is remembered of a run.

        Raises:
            NotFoundError: There is none of that id.
        """
        try:
            stored = json.loads((self._run_folder(run_id) / "run.json").read_text())
        except (OSError, UserInputError):
            raise NotFoundError(
                f"No training run {run_id!r} on this server.", "List the training runs."
            ) from None
        return Run(**{**stored, "lora": LoraSpec(**stored["lora"])})

    def runs(self) -> list[Run]:
        """All runs, newest first."""
        found = [self.run(_run_id(file.parent)) for file in self._runs.glob("*/run.json")]
        return sorted(found, key=lambda run: run.created_at, reverse=True)

    def save(self, new: NewCheckpoint, write: Callable[[Path], None]) -> Checkpoint:
        """Store what `write` puts into an empty folder.

        Raises:
            UserInputError: An unusable name or TTL, or the name is taken.
        """
        _check(new)
        target = self._run_folder(new.run_id) / new.kind / new.name
        if target.exists() and not new.overwrite:
            raise UserInputError(
                f"The name {new.name!r} is taken: tinker://{new.run_id}/{new.kind}/{new.name}.",
                "Choose another name, or save with overwrite=True.",
            )
        folder = self._unfinished / uuid.uuid4().hex
        folder.mkdir()
        try:
            write(folder)
            checkpoint = _describe(new, folder)
            _write_json(folder / "checkpoint.json", asdict(checkpoint))
            self._put(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return checkpoint

    def get(self, path: str) -> Checkpoint:
        """The checkpoint behind a tinker:// path.

        Raises:
            UserInputError: Not such a path.
            NotFoundError: Nothing is (or is any longer) stored there.
        """
        match = _PATH.fullmatch(path)
        if match is None or match[2] not in TYPES:
            raise UserInputError(
                f"{path!r} is no checkpoint path.",
                "Use tinker://<run>/weights/<name> or tinker://<run>/sampler_weights/<name>.",
            )
        for checkpoint in self.of_run(match[1]):
            if checkpoint.path == path:
                return checkpoint
        raise NotFoundError(f"No checkpoint {path!r} on this server.", "List the checkpoints.")

    def of_run(self, run_id: str) -> list[Checkpoint]:
        """A run's checkpoints, newest first.

        Raises:
            NotFoundError: There is no such run.
        """
        self.run(run_id)
        return _newest_first(self._stored(self._run_folder(run_id)))

    def all(self) -> list[Checkpoint]:
        """Every run's checkpoints, newest first."""
        return _newest_first(c for run in self._runs.iterdir() for c in self._stored(run))

    def delete(self, path: str) -> None:
        """Remove a checkpoint; raises as `get` does."""
        self._discard(self.folder(self.get(path)))

    def folder(self, checkpoint: Checkpoint) -> Path:
        return self._run_folder(checkpoint.run_id) / checkpoint.kind / checkpoint.name

    def ephemeral_folder(self, sampler_id: str) -> Path:
        """A new, empty folder for the weights of an unnamed sampler."""
        folder = self._ephemeral / sampler_id.replace(":", "_")
        folder.mkdir()
        return folder

    def drop_ephemeral(self, sampler_id: str) -> None:
        """Remove an unnamed sampler's weights; nothing happens for one that has a name."""
        shutil.rmtree(self._ephemeral / sampler_id.replace(":", "_"), ignore_errors=True)

    def _stored(self, run: Path) -> Iterator[Checkpoint]:
        for file in run.glob("*/*/checkpoint.json"):
            try:
                checkpoint = Checkpoint(**json.loads(file.read_text()))
            except FileNotFoundError:
                continue  # replaced or deleted since glob saw it
            if checkpoint.is_expired:
                self._discard(file.parent)
            else:
                yield checkpoint

    def _run_folder(self, run_id: str) -> Path:
        if not _RUN_ID.fullmatch(run_id):
            raise UserInputError(f"{run_id!r} is no training run id.", "List the training runs.")
        return self._runs / run_id.replace(":", "_")

    def _put(self, folder: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        replaced = self._unfinished / uuid.uuid4().hex
        # Two renames with nothing between: removing the old one first would take milliseconds in
        # which a crash costs both.
        with contextlib.suppress(FileNotFoundError):
            target.rename(replaced)
        folder.rename(target)
        _sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _discard(self, folder: Path) -> None:
        """Remove a folder such that it is never seen half-removed; it may be gone already."""
        trash = self._unfinished / uuid.uuid4().hex
        with contextlib.suppress(FileNotFoundError):
            folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _check(new: NewCheckpoint) -> None:
    if not _NAME.fullmatch(new.name):
        raise UserInputError(
            f"{new.name!r} is no usable checkpoint name.",
            "Use 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit.",
        )
    if new.ttl_s is not None and not 3600 <= new.ttl_s <= 315_360_000:
        raise UserInputError(
            f"ttl_seconds is {new.ttl_s}.", "Use 3600 (an hour) to 315360000 (ten years)."
        )


def _describe(new: NewCheckpoint, folder: Path) -> Checkpoint:
    now = datetime.now(UTC)
    expires = None if new.ttl_s is None else (now + timedelta(seconds=new.ttl_s)).isoformat()
    size_bytes = 0
    for file in folder.iterdir():
        size_bytes += file.stat().st_size
        _sync(file)
    return Checkpoint(
        new.run_id, new.kind, new.name, now.isoformat(), size_bytes, expires, new.user_metadata
    )


def _newest_first(checkpoints: Iterator[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.created_at, reverse=True)


def _run_id(folder: Path) -> str:
    return folder.name.replace("_", ":")


def _write_json(file: Path, value: object) -> None:
    """Write it whole or not at all."""
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=2))
    _sync(beside)
    beside.replace(file)


def _sync(path: Path) -> None:
    """Have the disk hold it before anything is built on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
