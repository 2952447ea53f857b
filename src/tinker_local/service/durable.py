"""Files that are whole or absent, whenever the process or the machine ends."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def write_json(file: Path, value: object) -> None:
    """Write `file` such that a reader, and the next start, sees the old content or the new."""
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=2))
    sync(beside)
    beside.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before anything is built on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_or_copy(source: Path, target: Path) -> None:
    """Give a file that is never written again a second name; copy it where that cannot be done."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
