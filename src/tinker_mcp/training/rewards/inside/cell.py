"""The inner process of a jail: shuts itself in, then takes in foreign code and scores with it."""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Any

from tinker_mcp.training.rewards.inside import frames, kernel, landlock, seccomp, worker

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_FACTS = (
    "/usr/share/zoneinfo",
    "/etc/localtime",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu",
)
_SOURCES = ("/dev/urandom", "/dev/random")
_DEVICES = ("/dev/null", "/dev/zero")


def main(config: dict[str, Any], held: dict[str, bool], answers: int) -> None:
    """Answer requests from standard input until it ends; says first which walls stand."""
    end_with_parent()
    requests = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if config["is_keeper"]:
        from tinker_mcp.training.rewards.inside import keeper

        keeper.serve(config, held, requests, answers)
        return
    frames.send(answers, {"held": enclose(config, held)})
    sys.path += config["site"]
    worker.serve(frames.receive(requests), requests, answers)


def enclose(config: dict[str, Any], held: dict[str, bool]) -> dict[str, bool]:
    """Shut this process in, as far as the kernel can; which kinds of isolation hold."""
    os.chdir(config["scratch"])
    os.umask(0o077)
    memory = _limited(config["limits"], has_namespaces=held["namespaces"])
    try:
        kernel.no_new_privileges()
        kernel.drop_capabilities()
        is_powerless = True
    except OSError:
        is_powerless = os.getuid() != 0
    version = _landlocked(config)
    has_filter = _filtered()
    return {
        "network": is_powerless and (held["namespaces"] or has_filter),
        "files": is_powerless
        and (version >= landlock.READS_COMPLETE_ABI or (version > 0 and held["read_only_mounts"])),
        "memory": memory,
        "processes": has_filter,
    }


def end_with_parent() -> None:
    """Where no namespace does it, the kernel ends this process with the one that forked it."""
    try:
        kernel.die_with_parent(signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux: the end of the pipe must do
        return


def _limited(limits: dict[str, Any], *, has_namespaces: bool) -> bool:
    wanted = {
        "RLIMIT_CPU": limits["cpu_s"],
        "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_NOFILE": limits["files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_DATA": limits["memory_bytes"],
        "RLIMIT_AS": limits["address_bytes"],  # shared memory, which DATA does not count
    }
    if has_namespaces:  # elsewhere it would count all processes of the user
        wanted["RLIMIT_NPROC"] = limits["threads"]
    is_complete = True
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (OSError, ValueError, AttributeError):
            is_complete = False
    return is_complete


def _landlocked(config: dict[str, Any]) -> int:
    """The ABI of Landlock that holds, 0 for none."""
    readable = [*_LIBRARIES, *_FACTS, *_SOURCES, *config["readable"]]
    try:
        return landlock.restrict(readable, config["listable"], [config["scratch"]], _DEVICES)
    except OSError:
        return 0


def _filtered() -> bool:
    try:
        seccomp.restrict_worker()
    except OSError:
        return False
    return True
