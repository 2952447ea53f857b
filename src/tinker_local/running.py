"""The note a running server leaves in its state directory, so that others find it.

`server.json` holds the address and the key, readable by its owner alone (mode 0600 in a folder of
mode 0700). `server.lock` is held for as long as the server lives, so one state directory has one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
from filelock import BaseFileLock, FileLock, Timeout

from tinker_local.errors import UserInputError

_NOTE, _LOCK = "server.json", "server.lock"
_LOOK_S = 0.5  # `find` takes the lock for a moment to see whether a server has it


@dataclass(frozen=True)
class RunningServer:
    """What a client must know; `env` are the variables that lead any SDK program here."""

    base_url: str
    api_key: str
    pid: int
    models: list[str]
    env: dict[str, str]

    def ready_line(self) -> str:
        return json.dumps(asdict(self))


def default_state_dir() -> Path:
    """Where training runs and checkpoints lie unless `--state-dir` says otherwise."""
    return Path(platformdirs.user_state_dir("tinker-local"))


def claim(state_dir: Path) -> BaseFileLock:
    """Take the state directory for this process, until it ends.

    The note of a predecessor that was killed is withdrawn.

    Raises:
        UserInputError: Another server has it, or it cannot be written.
    """
    lock = FileLock(state_dir / _LOCK)
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.acquire(timeout=_LOOK_S)
    except Timeout:
        raise UserInputError(
            f"Another tinker-local serves {state_dir}.",
            "Use it (`tinker-local env` prints how), end it, or give another --state-dir.",
        ) from None
    except OSError as error:
        raise UserInputError(
            f"The state directory {state_dir} cannot be used: {error.strerror}.",
            "Give a --state-dir that can be written.",
        ) from None
    withdraw(state_dir)
    return lock


def publish(state_dir: Path, server: RunningServer) -> None:
    """Leave the note; never readable by others, not even for a moment."""
    beside = state_dir / f"{_NOTE}.{server.pid}"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(server.ready_line())
    beside.replace(state_dir / _NOTE)


def withdraw(state_dir: Path) -> None:
    """Take the note away again."""
    (state_dir / _NOTE).unlink(missing_ok=True)


def find(state_dir: Path) -> RunningServer:
    """The server that serves `state_dir` now.

    Raises:
        UserInputError: None does.
    """
    if _is_claimed(state_dir):
        try:
            return RunningServer(**json.loads((state_dir / _NOTE).read_text()))
        except FileNotFoundError:
            pass
    raise UserInputError(f"No tinker-local serves {state_dir}.", "Start it: `tinker-local serve`.")


def _is_claimed(state_dir: Path) -> bool:
    if not (state_dir / _LOCK).exists():
        return False
    try:
        with FileLock(state_dir / _LOCK).acquire(blocking=False):
            return False
    except Timeout:
        return True
