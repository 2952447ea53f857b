"""Who uses the local backend of a home, told without a list that could go stale.

The backend's standard input is the reading end of a named pipe, `users`, in its state directory,
and each process that uses it holds the writing end. The kernel takes that away however the
process ends; the backend ends when nobody holds it any more (`tinker_local.lifeline`). One that
a user started by hand has another standard input, and stays.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_PIPE = "users"


def reading_end(folder: Path) -> int:
    """A descriptor for a new backend's standard input; makes the pipe where there is none.

    Raises:
        OSError: The folder cannot be written.
    """
    pipe = folder / _PIPE
    if pipe.exists() and not pipe.is_fifo():  # never the one that another process just made
        pipe.unlink(missing_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkfifo(pipe, 0o600)
    return os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # without a writer it would block


class Lifeline:
    """This process's hold on the backend of `folder`: kept until `let_go` or its end."""

    def __init__(self, folder: Path) -> None:
        self._pipe = folder / _PIPE
        self._descriptor: int | None = None

    def hold(self) -> None:
        """Take hold where a backend has the reading end; nothing happens where none has."""
        if self._descriptor is not None and self._is_current(self._descriptor):
            return
        self.let_go()
        try:
            # Not inherited by children, so that no worker keeps the backend by accident.
            self._descriptor = os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: nobody reads
            self._descriptor = None

    def let_go(self) -> None:
        """Stop using the backend."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        """Whether the pipe is still the one that lies in the folder."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._pipe.stat())
        except OSError:
            return False
