"""The outer process of a jail: leaves the namespaces, starts the cell, and watches it.

It runs no foreign code and outlives neither the cell nor the process that asked for the jail: the
kernel closes the lifeline's other end when that one ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import Any

from tinker_mcp.training.rewards.inside import cell, frames, kernel
from tinker_mcp.training.rewards.inside.errors import EXIT_MEMORY, EXIT_THREADS

_ALL = (
    kernel.CLONE_NEWNET
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWUTS
)
_LOOK_EVERY_MS = 50


def main(answers: int, lifeline: int) -> None:
    """Read the configuration from standard input and run the cell until it or we end."""
    config = frames.receive(0)
    held = _new_namespaces(config)
    inner = os.fork()
    if inner == 0:
        os.close(lifeline)
        cell.main(config, held, answers)
        os._exit(0)
    os.close(answers)
    _let_go_of_standard_streams()
    os._exit(_watch(inner, lifeline, config["limits"]))


def _new_namespaces(config: dict[str, Any]) -> dict[str, bool]:
    """Go as far as this kernel and user may; which of it holds."""
    held = {"namespaces": _unshared(), "read_only_mounts": False}
    if held["namespaces"]:
        with contextlib.suppress(OSError):
            kernel.private_mounts()
            kernel.read_only_mounts()
            held["read_only_mounts"] = True
        with contextlib.suppress(OSError):
            kernel.tmpfs(config["scratch"], config["limits"]["scratch_bytes"])
    return held


def _unshared() -> bool:
    uid, gid = os.getuid(), os.getgid()
    try:
        kernel.unshare(kernel.CLONE_NEWUSER | _ALL)
    except OSError:
        try:
            kernel.unshare(_ALL)  # root may where user namespaces are switched off
        except OSError:
            return False
        return True
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
            file.write(text)
    return True


def _let_go_of_standard_streams() -> None:
    """So that the cell's end is the end of its pipes."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _watch(inner: int, lifeline: int, limits: dict[str, Any]) -> int:
    """Wait for the cell's end, or bring it about; the status to exit with."""
    look = select.poll()
    look.register(lifeline, select.POLLIN | select.POLLHUP)
    breach = 0
    while True:
        is_over = bool(look.poll(_LOOK_EVERY_MS))
        ended, status = os.waitpid(inner, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return breach or (code if code >= 0 else 128 - code)
        breach = breach or _breach(inner, limits)
        if is_over or breach:
            with contextlib.suppress(ProcessLookupError):
                os.kill(inner, signal.SIGKILL)  # the first process of its namespace: all go


def _breach(inner: int, limits: dict[str, Any]) -> int:
    """Which limit the cell or a worker of it exceeds that the kernel does not set a process."""
    for pid in (inner, *_children(inner)):
        threads, resident_bytes = _usage(pid)
        if threads > limits["threads"]:
            return EXIT_THREADS
        if resident_bytes > limits["memory_bytes"]:
            return EXIT_MEMORY
    return 0


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123
        return [int(word) for word in file.read().split()]
    return []


def _usage(pid: int) -> tuple[int, int]:
    """Threads and resident bytes."""
    found = {"Threads": 0, "VmRSS": 0}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:  # noqa: PTH123
        for line in file:
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0])
    return found["Threads"], found["VmRSS"] * 1024
