"""Which isolations hold on this machine: walls that say they stand, and attempts to get out."""

from __future__ import annotations

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.rewards.cell import Limits, Program
from tinker_mcp.training.rewards.jail import Held, Jail, Sample

_ATTEMPTS = ("network", "files", "memory", "processes")
_SOURCE = """
import os, socket

def network():
    socket.socket().close()

def files():
    for path in ("/etc/passwd", "/proc/1/environ"):
        try:
            open(path).close()
            return
        except OSError:
            pass
    open("/tmp/tinker-mcp-probe", "w").close()

def memory():
    bytearray(8 * 2**30)

def processes():
    if os.fork() == 0:
        os._exit(0)

ATTEMPTS = {"network": network, "files": files, "memory": memory, "processes": processes}

def reward(completion, row):
    try:
        ATTEMPTS[completion]()
    except (OSError, MemoryError):
        return 0
    return 1
"""


def probe() -> Held:
    """Start a jail and try to leave it; about 0.15 s. Blocking."""
    jail = Jail(Program("file", "probe.py", _SOURCE), Limits(wall_s=5.0, start_s=20.0))
    try:
        jail.open()
        results = jail.score([Sample((name,), ({},)) for name in _ATTEMPTS])
    except InvalidInputError:  # refused: what it said of itself is all there is
        return jail.held
    except OSError:  # no Python to start, no pipes
        return Held()
    finally:
        jail.close()
    failed = {name for name, (scored,) in zip(_ATTEMPTS, results, strict=True) if scored.value == 0}
    return Held(**{name: holds and name in failed for name, holds in vars(jail.held).items()})
