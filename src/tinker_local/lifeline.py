"""The end of a server whose users are gone.

Each of them holds the writing end of the pipe that the server has as its standard input. The
kernel lets go of it however a process ends, so nobody can be forgotten and no lock stays behind.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

GRACE_S = 2.0  # a host that restarts its server is back within a second
_STUCK_S = 4.0  # as long as a step or an import may keep the main thread from its signals


def end_with(descriptor: int, clear_up: Callable[[], None]) -> None:
    """End this process by SIGTERM once nobody has held the other end for GRACE_S.

    `clear_up` is called where the signal shows no effect.
    """
    threading.Thread(target=_watch, args=(descriptor, clear_up), daemon=True).start()


def _watch(descriptor: int, clear_up: Callable[[], None]) -> None:
    while True:
        if _is_cut(descriptor, None):
            time.sleep(GRACE_S)
            if _is_cut(descriptor, 0):
                break
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STUCK_S)
    clear_up()
    os._exit(1)


def _is_cut(descriptor: int, timeout_s: float | None) -> bool:
    """Whether nobody holds the other end; waits for a sign at most `timeout_s`, None for ever."""
    is_readable = bool(select.select([descriptor], [], [], timeout_s)[0])
    return is_readable and os.read(descriptor, 2**16) == b""
