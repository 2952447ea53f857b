"""Run a command and report the growth of a folder while it runs.

Downloads and the conversion run in processes of their own: HF_HOME and TMPDIR can be ours, their
output stays off our stdout, their memory goes back, and torch's global state here is untouched.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinker_local.weights.progress import Progress

_POLL_INTERVAL_S = 0.25
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ChildResult:
    """What a command left: its exit status and its output."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last line of stderr, without credentials: mostly the reason of a failure."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return without_credentials(lines[-1]) if lines else f"exit status {self.returncode}"


@dataclass(frozen=True)
class Watch:
    """What to report while a command runs: the bytes under `folder`, of `total_bytes`.

    Without a folder only the description is reported; without a total, bytes alone.
    """

    description: str
    folder: Path | None = None
    total_bytes: int | None = None


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of ours; -P keeps the working folder off its path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with changes, in which our modules can be imported."""
    paths = [str(_SOURCE_ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changes}


def run_watched(
    command: Sequence[str], environment: Mapping[str, str], watch: Watch, progress: Progress
) -> ChildResult:
    """Run a command to its end; it ends with us if we are interrupted."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )
        try:
            _report_until_exit(process, watch, progress)
        finally:
            process.kill()
            process.wait()
        stdout.seek(0)
        stderr.seek(0)
        return ChildResult(
            process.returncode,
            stdout.read().decode("utf-8", "replace"),
            stderr.read().decode("utf-8", "replace"),
        )


def without_credentials(text: str) -> str:
    """Remove `user:password@` from every URL in a text."""
    return re.sub(r"://[^/\s]*@", "://", text)


def _report_until_exit(process: subprocess.Popen[bytes], watch: Watch, progress: Progress) -> None:
    while process.poll() is None:
        progress(watch.description, _done_bytes(watch), watch.total_bytes)
        try:
            process.wait(timeout=_POLL_INTERVAL_S)
        except subprocess.TimeoutExpired:
            continue
    if process.returncode == 0 and watch.total_bytes is not None:
        progress(watch.description, watch.total_bytes, watch.total_bytes)


def _done_bytes(watch: Watch) -> int:
    if watch.folder is None:
        return 0
    done = folder_bytes(watch.folder)
    # pip copies the file at the end, so for a moment it lies there twice.
    return done if watch.total_bytes is None else min(done, watch.total_bytes)


def folder_bytes(folder: Path) -> int:
    """Return the sizes of all files under a folder, while others write and delete there."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += Path(parent, file).lstat().st_size
            except FileNotFoundError:
                continue
    return total
