"""A process with foreign code in it, and this side's ends of its pipes.

It is told once what it may take and read, and then asked with JSON. Whatever it does instead of
answering ends in a `CellLostError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinker_mcp.training.rewards.inside import frames
from tinker_mcp.training.rewards.inside.errors import EXIT_MEMORY, EXIT_THREADS

_SOURCE = Path(__file__).parents[3]  # the folder that holds the package
_START = (
    "import sys; answers, lifeline, source = sys.argv[1:]; sys.path.append(source); "
    "from tinker_mcp.training.rewards.inside.launcher import main; "
    "sys.path.remove(source); main(int(answers), int(lifeline))"
)
_SECRET_WORDS = ("secret", "credential", "token", "passw", "apikey", "api_key", "private", "sqlite")
_SECRET_ENDINGS = (".pem", ".key", ".env", ".netrc", ".p12", ".pfx")
_MAX_NEIGHBOURS = 256
_DRAIN_BYTES = 65536
_END_LIMIT_S = 5.0


@dataclass(frozen=True)
class Limits:
    """What foreign code may take.

    Attributes:
        wall_s: For one sample (of `reward_batch`: one call).
        start_s: Until it is loaded; torch alone takes seconds to import.
        cpu_s: Of one process in its whole life; the next sample gets a new one.
        memory_bytes: Of private memory, and resident in all.
        address_bytes: Of address space, shared memory included.
        file_bytes: Of each file in the scratch folder, which holds `scratch_bytes` in all where
            mounts can be had.
        output_bytes: Printed while one sample is scored.
    """

    wall_s: float = 10.0
    start_s: float = 60.0
    cpu_s: int = 600
    memory_bytes: int = 2 * 2**30
    address_bytes: int = 6 * 2**30
    file_bytes: int = 16 * 2**20
    scratch_bytes: int = 64 * 2**20
    output_bytes: int = 2**20
    files: int = 256
    threads: int = 64


@dataclass(frozen=True)
class Program:
    """What is to run inside.

    Attributes:
        kind: `file`: the user's source. `grader`: one of `inside/graders.py`, by name. `tests`:
            each completion is itself code, and gets a process of its own.
        name: The file's path or the grader's name.
        folder: Of the file; modules and data beside it can be read.
    """

    kind: Literal["file", "grader", "tests"]
    name: str
    source: str = ""
    folder: Path | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As the process inside gets it."""
        folder = None if self.folder is None else str(self.folder)
        return {**vars(self), "folder": folder}


class CellLostError(Exception):
    """The process inside cannot be asked any more; the sentence says why."""


class Cell:
    """One process inside, and this side's ends of its pipes."""

    def __init__(self, program: Program, limits: Limits) -> None:
        self._scratch = tempfile.mkdtemp(prefix="tinker-mcp-jail-")
        self._limits = limits
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self._printed = 0
        self._can_print = True
        self.served = 0  # samples; each may have left something behind
        self.is_closed = False
        answers, theirs = os.pipe()
        lifeline, self._lifeline = os.pipe()
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _START]
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs), str(lifeline), str(_SOURCE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                env=_environment(self._scratch),
                cwd="/",
                pass_fds=(theirs, lifeline),
                start_new_session=True,
            )
        except BaseException:
            os.close(answers)
            os.close(self._lifeline)
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        finally:
            os.close(theirs)
            os.close(lifeline)
        self._answers = answers
        assert self._process.stdin is not None  # noqa: S101  # piped above
        assert self._process.stdout is not None  # noqa: S101
        self._requests, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._requests, self._output, self._answers):
            os.set_blocking(descriptor, False)
        self.send(
            {
                "is_keeper": program.kind == "tests",
                "limits": dataclasses.asdict(limits),
                "readable": _readable(program),
                "listable": [str(program.folder)] if program.folder else [],
                "scratch": self._scratch,
                "site": _site(),
            }
        )

    def send(self, message: Any) -> None:
        """Have a message written while answers are waited for."""
        self._outgoing += frames.packed(message)

    def expect_silence(self) -> None:
        """Nothing may have been said that nobody asked for.

        Raises:
            CellLostError: Something was, or it has ended meanwhile.
        """
        self._printed = 0
        self._exchange(0.0)
        if self._incoming:
            raise CellLostError("it answered what it was not asked")

    def receive(self, limit_s: float, limit_bytes: int) -> dict[str, Any]:
        """The next answer, which is a JSON object.

        Raises:
            CellLostError: It does not come in time, is too long or is no answer.
        """
        deadline = time.monotonic() + limit_s
        while (body := self._frame(limit_bytes)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise CellLostError(f"it took longer than {limit_s:g} s")
            self._exchange(left)
        self._printed = 0
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise CellLostError("it answered what is no JSON") from error
        if not isinstance(answer, dict):
            raise CellLostError("it answered what is no answer")
        return answer

    def kill(self) -> None:
        """End the process from another thread; the kernel ends what it has started."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def close(self) -> None:
        """End the process with all that it has started, and take its scratch folder away."""
        if self.is_closed:
            return
        self.is_closed = True
        os.close(self._lifeline)  # the launcher ends the cell, and with it its namespace
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        os.close(self._answers)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _frame(self, limit_bytes: int) -> bytes | None:
        """The body of the first whole message that has come."""
        if len(self._incoming) < frames.HEADER.size:
            return None
        (length,) = frames.HEADER.unpack_from(self._incoming)
        if length > limit_bytes:
            raise CellLostError(f"it answered more than {limit_bytes} bytes")
        end = frames.HEADER.size + length
        if len(self._incoming) < end:
            return None
        body = bytes(self._incoming[frames.HEADER.size : end])
        del self._incoming[:end]
        return body

    def _exchange(self, timeout_s: float) -> None:
        """Wait for something to read or to write, and do it."""
        look = select.poll()
        look.register(self._answers, select.POLLIN)
        if self._can_print:
            look.register(self._output, select.POLLIN)
        if self._outgoing:
            look.register(self._requests, select.POLLOUT)
        ready = dict(look.poll(timeout_s * 1000))
        if self._output in ready:
            self._drain()
        if self._requests in ready:
            self._write()
        if self._answers in ready:
            part = _read(self._answers)
            if part == b"":
                raise CellLostError(self._end())
            self._incoming += part or b""

    def _drain(self) -> None:
        """Throw away what was printed."""
        part = _read(self._output)
        self._can_print = part != b""
        self._printed += len(part or b"")
        if self._printed > self._limits.output_bytes:
            raise CellLostError(f"it printed more than {self._limits.output_bytes >> 10} KiB")

    def _write(self) -> None:
        try:
            written = os.write(self._requests, memoryview(self._outgoing)[:_DRAIN_BYTES])
        except BlockingIOError:
            return
        except BrokenPipeError as error:
            raise CellLostError(self._end()) from error
        del self._outgoing[:written]

    def _end(self) -> str:
        """Why it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_LIMIT_S)
        status = self._process.returncode
        if status == EXIT_MEMORY:
            return f"it took more than {self._limits.memory_bytes >> 20} MiB of memory"
        if status == EXIT_THREADS:
            return f"it started more than {self._limits.threads} threads"
        if status is not None and status > 128:
            return f"its process ended by signal {status - 128}"
        return "its process ended" + (f" with status {status}" if status is not None else "")


def _read(descriptor: int) -> bytes | None:
    """What can be read at once; None for nothing, b"" at the end."""
    try:
        return os.read(descriptor, _DRAIN_BYTES)
    except BlockingIOError:
        return None


def _environment(scratch: str) -> dict[str, str]:
    """All that foreign code gets to know: built from nothing, so that no secret is in it."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        **one,
    }


def _site() -> list[str]:
    """Where installed packages lie."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def _readable(program: Program) -> list[str]:
    """Python, its packages, and what lies beside the reward's file."""
    paths = sysconfig.get_paths()
    python = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    library = sysconfig.get_config_var("LIBDIR") or ""
    own = [str(_SOURCE / "tinker_mcp" / "training" / "rewards")]
    beside = [] if program.folder is None else _neighbours(program.folder)
    return [path for path in (*python, library, *_site(), *own, *beside) if path]


def _neighbours(folder: Path) -> list[str]:
    """The files of a folder, but none that is hidden, a link or named like a secret."""
    found = []
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        is_secret = (
            name.startswith((".", "id_"))
            or name.endswith(_SECRET_ENDINGS)
            or any(word in name for word in _SECRET_WORDS)
        )
        if path.is_file() and not path.is_symlink() and not is_secret:
            found.append(str(path))
    return found[:_MAX_NEIGHBOURS]
