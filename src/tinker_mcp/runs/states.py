"""The states of a run and the moves between them.

```
starting -> running <-> waiting
    |          |           |
    +----------+-----------+--> completed | stopped | failed
```

`crashed` is never written: it is what a run is called whose worker gave no sign of life for
CRASHED_AFTER_S while its state says that there is one. Every ended run can be started again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

RunState = Literal["starting", "running", "waiting", "completed", "stopped", "failed", "crashed"]

StopReason = Literal["user", "budget", "divergence"]
"""Why a run is `stopped`."""

HEARTBEAT_S = 2.0
CRASHED_AFTER_S = 10.0

ACTIVE: tuple[RunState, ...] = ("starting", "running", "waiting")
ENDED: tuple[RunState, ...] = ("completed", "stopped", "failed")

_AGAIN: tuple[RunState, ...] = ("starting",)
MOVES: Mapping[RunState, Collection[RunState]] = {
    "starting": ("running", "waiting", *ENDED),
    "running": ("waiting", *ENDED),
    "waiting": ("running", *ENDED),
    **dict.fromkeys(ENDED, _AGAIN),
}
"""From a written state to those that may follow it."""


def told(written: RunState, heartbeat_age_s: float, *, is_process_gone: bool = False) -> RunState:
    """The state to tell of a run, from the one that is written and its worker's last sign."""
    if written in ACTIVE and (is_process_gone or heartbeat_age_s > CRASHED_AFTER_S):
        return "crashed"
    return written
