"""A folder beside the finished ones, in which they are made and unmade.

Must lie on their file system: what appears or goes does so by one rename.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from tinker_local.service.durable import sync

_REPLACED = ".replaced"


class Staging:
    """Puts folders in their place whole, and takes them away whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def interrupted(self) -> list[Path]:
        """What was taken out of its place for something that, perhaps, never took it.

        Whoever starts after a kill puts it back where its place is empty, before `clear`.
        """
        return list(self._folder.glob(f"*{_REPLACED}"))

    def clear(self) -> None:
        """Remove what a killed process left half-made."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def new(self) -> Iterator[Path]:
        """An empty folder; what has not been put anywhere by the end is removed."""
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, folder: Path, target: Path) -> None:
        """Move a finished folder to its place, instead of the one that is there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(target.parent.parent)
        # Two renames with nothing between; a kill there is what `interrupted` is for.
        replaced = self._folder / f"{uuid.uuid4().hex}{_REPLACED}"
        with contextlib.suppress(FileNotFoundError):
            target.rename(replaced)
        folder.rename(target)
        sync(target.parent)
        self.discard(replaced)

    def discard(self, folder: Path) -> None:
        """Remove a folder such that it is never seen half-removed; it may be gone already."""
        trash = self._folder / uuid.uuid4().hex
        with contextlib.suppress(FileNotFoundError):
            folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
