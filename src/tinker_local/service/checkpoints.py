"""Saved weights by name: where they lie, what is known of them, which exist.

```
<state dir>/runs/<run>/run.json
                      /weights/<name>/          checkpoint.json + what the engine wrote
                      /sampler_weights/<name>/
                      /external_weights/<name>/
           /ephemeral/<sampler>/                weights of unnamed samplers, gone at the next start
           /unfinished/                         being written or removed; never listed
```

A checkpoint is written beside and renamed, so it is either whole or absent. The files of one are
never written again; its description (TTL, public or not) is replaced as a whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from tinker_local.errors import NotFoundError, UserInputError
from tinker_local.ops import LoraSpec
from tinker_local.service.checkpoint_records import (
    TYPES,
    Checkpoint,
    NewCheckpoint,
    Run,
    check_name,
    check_ttl,
    expiry,
    folder_name,
    is_name,
    is_run_id,
    parse_checkpoint_path,
    run_id_of,
)
from tinker_local.service.durable import share_or_copy, sync, write_json
from tinker_local.service.staging import Staging

__all__ = ["TYPES", "Catalog", "Checkpoint", "NewCheckpoint", "Run"]

log = structlog.get_logger()

_DESCRIPTION = "checkpoint.json"
_OURS = {_DESCRIPTION, "checkpoint.tmp"}


class Catalog:
    """The checkpoints under one state directory. Safe to call from several threads."""

    def __init__(self, state_dir: Path) -> None:
        self._runs = state_dir / "runs"
        self._staging = Staging(state_dir / "unfinished")
        self._ephemeral = state_dir / "ephemeral"
        # Held while folders are looked for, put in place, described anew or removed; never while
        # the engine writes one.
        self._lock = threading.RLock()
        self._next_expiry: datetime | None = None
        self._inflight: dict[str, Path] = {}
        self._put_back_replaced()
        self._staging.clear()
        shutil.rmtree(self._ephemeral, ignore_errors=True)
        for folder in (self._runs, self._ephemeral):
            folder.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def add_run(self, run: Run) -> None:
        folder = self._run_folder(run.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        sync(self._runs)
        write_json(folder / "run.json", asdict(run))

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
        ids = [run_id_of(file.parent.name) for file in self._runs.glob("*/run.json")]
        found = [self.run(run_id) for run_id in ids if is_run_id(run_id)]
        return sorted(found, key=lambda run: run.created_at, reverse=True)

    def save(self, new: NewCheckpoint, write: Callable[[Path], None]) -> Checkpoint:
        """Store what `write` puts into an empty folder.

        Raises:
            UserInputError: An unusable name or TTL, or the name is taken.
        """
        check_name(new.name)
        check_ttl(new.ttl_s)
        target = self._run_folder(new.run_id) / new.kind / new.name
        with self._lock:
            self._check_free(new, target)
        with self._staging.new() as folder:
            write(folder)
            checkpoint = _describe(new, folder)
            write_json(folder / _DESCRIPTION, asdict(checkpoint))
            with self._lock:
                self._check_free(new, target)
                self._staging.put(folder, target)
        self._expect(checkpoint)
        return checkpoint

    def copy(self, source_path: str, run_id: str, ttl_s: int | None) -> Checkpoint:
        """Give a checkpoint's files to the run `run_id`, which is made for it, as well.

        Kind, name and metadata stay; the files are shared, and the source's TTL is not inherited.
        The same copy again is the one that exists.

        Raises:
            UserInputError: An unusable path or TTL, or the run holds something else.
            NotFoundError: There is no such checkpoint.
        """
        check_ttl(ttl_s)
        with self._lock:
            source = self.get(source_path)
            new = NewCheckpoint(run_id, source.kind, source.name, ttl_s, source.user_metadata)
            with contextlib.suppress(NotFoundError):
                return self.get(new.path)
            self._add_run_of_copy(source, run_id)
            return self.save(new, lambda folder: self._share_files(source, folder))

    def get(self, path: str) -> Checkpoint:
        """The checkpoint behind a tinker:// path.

        Raises:
            UserInputError: Not such a path.
            NotFoundError: Nothing is (or is any longer) stored there.
        """
        run_id, kind, name = parse_checkpoint_path(path)
        if is_run_id(run_id) and is_name(name):
            with self._lock:  # else it could be missed while another takes its place
                checkpoint = self._live(self._run_folder(run_id) / kind / name)
            if checkpoint is not None:
                return checkpoint
        raise NotFoundError(f"No checkpoint {path!r} on this server.", "List the checkpoints.")

    def of_run(self, run_id: str) -> list[Checkpoint]:
        """A run's checkpoints, newest first.

        Raises:
            NotFoundError: There is no such run.
        """
        self.run(run_id)
        with self._lock:
            return _newest_first(self._stored(self._run_folder(run_id)))

    def all(self) -> list[Checkpoint]:
        """Every run's checkpoints, newest first."""
        with self._lock:
            return _newest_first(c for run in self._runs.iterdir() for c in self._stored(run))

    def set_ttl(self, path: str, ttl_s: int | None) -> Checkpoint:
        """Let a checkpoint expire `ttl_s` seconds from now, or never; raises as `get` does.

        Raises:
            UserInputError: The TTL is out of range.
        """
        check_ttl(ttl_s)
        changed = self._change(path, expires_at=expiry(datetime.now(UTC), ttl_s))
        self._expect(changed)
        return changed

    def set_public(self, path: str, is_public: bool) -> Checkpoint:
        """Note that a checkpoint is public, or that it is not; raises as `get` does."""
        return self._change(path, is_public=is_public)

    def delete(self, path: str) -> None:
        """Remove a checkpoint; raises as `get` does."""
        with self._lock:
            self._staging.discard(self.folder(self.get(path)))

    @property
    def has_expired(self) -> bool:
        """Whether a checkpoint's time has come since the last sweep."""
        return self._next_expiry is not None and self._next_expiry <= datetime.now(UTC)

    def sweep(self) -> None:
        """Remove what has expired from disk; until then it is only not to be seen."""
        with self._lock:
            self._next_expiry = None
        for checkpoint in self.all():
            self._expect(checkpoint)

    def folder(self, checkpoint: Checkpoint) -> Path:
        return self._run_folder(checkpoint.run_id) / checkpoint.kind / checkpoint.name

    def files(self, checkpoint: Checkpoint) -> list[Path]:
        """What was saved, without our own description.

        Raises:
            NotFoundError: It is gone.
        """
        try:
            found = sorted(self.folder(checkpoint).iterdir())
        except FileNotFoundError:
            raise NotFoundError(
                f"No checkpoint {checkpoint.path!r} on this server.", "List the checkpoints."
            ) from None
        return [file for file in found if file.name not in _OURS]

    def ephemeral_folder(self, sampler_id: str) -> Path:
        """A new, empty folder for the weights of an unnamed sampler."""
        folder = self._ephemeral / sampler_id.replace(":", "_")
        folder.mkdir()
        return folder

    def put_inflight(self, model_id: str, sampler_id: str, write: Callable[[Path], None]) -> Path:
        """Renew the weights that all in-flight samplers of a model share; the folder they lie in.

        It goes with the first of them. Each file takes the old one's place whole, so whoever reads
        meanwhile has one or the other.
        """
        if model_id not in self._inflight:
            self._inflight[model_id] = self.ephemeral_folder(sampler_id)
        with self._staging.new() as fresh:
            write(fresh)
            for file in fresh.iterdir():
                file.replace(self._inflight[model_id] / file.name)
        return self._inflight[model_id]

    def drop_ephemeral(self, sampler_id: str) -> None:
        """Remove an unnamed sampler's weights; nothing happens for one that has a name."""
        shutil.rmtree(self._ephemeral / sampler_id.replace(":", "_"), ignore_errors=True)

    def _add_run_of_copy(self, source: Checkpoint, run_id: str) -> None:
        run = self.run(source.run_id)
        with contextlib.suppress(NotFoundError):
            if self.of_run(run_id):
                raise UserInputError(
                    f"The run {run_id!r} holds other checkpoints.", "Copy into a new one."
                )
        self.add_run(replace(run, run_id=run_id, created_at=datetime.now(UTC).isoformat()))

    def _share_files(self, source: Checkpoint, folder: Path) -> None:
        for file in self.files(source):
            share_or_copy(file, folder / file.name)

    def _stored(self, run: Path) -> Iterator[Checkpoint]:
        for file in run.glob(f"*/*/{_DESCRIPTION}"):
            checkpoint = self._live(file.parent)
            if checkpoint is not None:
                yield checkpoint

    def _live(self, folder: Path) -> Checkpoint | None:
        """The checkpoint in a folder; one that has expired is removed instead."""
        checkpoint = _read(folder)
        if checkpoint is None or not checkpoint.is_expired:
            return checkpoint
        self._staging.discard(folder)
        return None

    def _check_free(self, new: NewCheckpoint, target: Path) -> None:
        if new.overwrite or not target.exists():
            return
        if self._live(target) is None and not target.exists():  # it had expired
            return
        raise UserInputError(
            f"The name {new.name!r} is taken: {new.path}.",
            "Choose another name, or save with overwrite=True."
            if new.kind == "weights"
            else "Choose another name, or delete that checkpoint.",
        )

    def _change(self, path: str, **changes: Any) -> Checkpoint:
        with self._lock:
            changed = replace(self.get(path), **changes)
            write_json(self.folder(changed) / _DESCRIPTION, asdict(changed))
        return changed

    def _expect(self, checkpoint: Checkpoint) -> None:
        """Remember when the next sweep is due."""
        if checkpoint.expires_at is None:
            return
        end = datetime.fromisoformat(checkpoint.expires_at)
        with self._lock:
            self._next_expiry = min(end, self._next_expiry or end)

    def _run_folder(self, run_id: str) -> Path:
        if not is_run_id(run_id):
            raise UserInputError(f"{run_id!r} is no training run id.", "List the training runs.")
        return self._runs / folder_name(run_id)

    def _put_back_replaced(self) -> None:
        """Undo an overwrite that was cut off when the old checkpoint had gone and no new one come.

        What was merely deleted, or replaced in full, stays so.
        """
        for folder in self._staging.interrupted():
            checkpoint = _description(folder)
            if checkpoint is None or not (
                is_run_id(checkpoint.run_id) and is_name(checkpoint.name)
            ):
                continue
            if checkpoint.kind in TYPES and not self.folder(checkpoint).exists():
                folder.rename(self.folder(checkpoint))


def _read(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, if its description belongs there."""
    checkpoint = _description(folder)
    if checkpoint is None:
        return None
    expected = (folder_name(checkpoint.run_id), checkpoint.kind, checkpoint.name)
    return checkpoint if folder.parts[-3:] == expected else None


def _description(folder: Path) -> Checkpoint | None:
    try:
        return Checkpoint(**json.loads((folder / _DESCRIPTION).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None  # replaced or deleted since it was seen
    except (ValueError, TypeError) as error:
        log.warning("unreadable_checkpoint", folder=str(folder), error=str(error))
        return None


def _describe(new: NewCheckpoint, folder: Path) -> Checkpoint:
    now = datetime.now(UTC)
    size_bytes = 0
    for file in folder.iterdir():
        size_bytes += file.stat().st_size
        sync(file)
    return Checkpoint(
        run_id=new.run_id,
        kind=new.kind,
        name=new.name,
        created_at=now.isoformat(),
        size_bytes=size_bytes,
        expires_at=expiry(now, new.ttl_s),
        user_metadata=new.user_metadata,
    )


def _newest_first(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.created_at, reverse=True)
