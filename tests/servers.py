"""tinker-local as a process of its own, for the tests that speak to it over loopback."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

START_BOUND_S = 60.0  # importing torch and transformers: 5 s, on a busy machine several times that
STOP_BOUND_S = 10.0


@dataclass(frozen=True)
class LocalServer:
    """A running `tinker-local serve`.

    Attributes:
        env: What a program on the SDK needs in its environment to use this server.
        log: Its stderr.
    """

    base_url: str
    api_key: str
    pid: int
    models: list[str]
    env: dict[str, str]
    process: subprocess.Popen[str]
    state_dir: Path
    log: Path

    @property
    def port(self) -> int:
        return int(self.base_url.rpartition(":")[2])

    def stop(self) -> int:
        """End it with SIGTERM, as a supervisor would; return its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_BOUND_S)
        except subprocess.TimeoutExpired:
            return self.kill()
        finally:
            _close(self.process)

    def kill(self) -> int:
        """End it with SIGKILL, as the kernel would; return its exit status."""
        self.process.kill()
        status = self.process.wait(STOP_BOUND_S)
        _close(self.process)
        return status


def serve_command(state_dir: Path, *args: str, model: str = "tinker-local/tiny") -> list[str]:
    """The argv of a server of `model` in float32; `args` are added."""
    return [
        *(sys.executable, "-m", "tinker_local", "serve", "--model", model),
        *("--dtype", "float32", "--state-dir", str(state_dir), *args),
    ]


def start_server(
    state_dir: Path, *args: str, model: str = "tinker-local/tiny", threads: int = 1
) -> LocalServer:
    """Start a server and wait for its ready line.

    `threads` is 1 since the tiny model gains nothing from more, and several servers share the
    machine with the tests.

    Raises:
        AssertionError: It ended, or was not ready in START_BOUND_S; holds its stderr.
    """
    state_dir.parent.mkdir(parents=True, exist_ok=True)
    log = state_dir.with_name(f"{state_dir.name}.stderr.log")
    with log.open("a") as stderr:
        process = subprocess.Popen(
            serve_command(state_dir, *args, model=model),
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdout is not None
    is_readable = bool(select.select([process.stdout], [], [], START_BOUND_S)[0])
    line = process.stdout.readline() if is_readable else ""
    if not line:
        process.kill()
        process.wait(STOP_BOUND_S)
        _close(process)
        raise AssertionError(f"tinker-local was not ready: {log.read_text()}")
    return LocalServer(**json.loads(line), process=process, state_dir=state_dir, log=log)


def serve_tiny_alone(patch: pytest.MonkeyPatch) -> None:
    """A backend that the tested code starts serves the tiny model."""
    patch.setenv("TINKER_LOCAL_MODELS", "tinker-local/tiny")
    patch.setenv("TINKER_LOCAL_DTYPE", "float32")
    patch.setenv("OMP_NUM_THREADS", "1")


def backends_of(home: Path) -> list[psutil.Process]:
    """The live local backends of a home, whoever started them."""
    found = []
    for process in psutil.process_iter():
        try:
            is_one = str(home / "local") in process.cmdline()
            if is_one and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # gone meanwhile
            continue
    return found


def end_backends(home: Path) -> None:
    """End whatever serves a home, started or starting."""
    for process in backends_of(home):
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(backends_of(home), timeout=STOP_BOUND_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)


def _close(process: subprocess.Popen[str]) -> None:
    if process.stdout is not None:
        process.stdout.close()
