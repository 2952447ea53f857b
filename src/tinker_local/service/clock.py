"""The hosted service's clock, simulated: training work is picked up at ticks only.

At a tick every training client may run one step: the requests that wait, up to and including the
first optim_step. What comes after the tick waits for the next one, so a client that sends its
optim_step only once it has the result of its forward_backward needs two cycles a step. The cycles
a training loop wastes can be counted that way, without the hosted service.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """Says whose jobs may run.

    Attributes:
        cycle_s: Seconds between two ticks; None where there are none.
        ticks: Cycles that have begun.
    """

    cycle_s: float | None
    ticks: int

    def tick(self, waiting: Mapping[str, Sequence[bool]]) -> None:
        """Look at the time; `waiting` tells of each lane's jobs whether they end a step."""

    def may_run(self, lane: str) -> bool: ...

    def done(self, lane: str) -> None:
        """A lane's first job is finished."""

    def next_tick_in_s(self) -> float | None:
        """Seconds until the next tick; None if there is none to wait for."""

    def cycles(self) -> Mapping[str, CyclesUsed]:
        """What each lane has made of the cycles."""


@dataclass(frozen=True)
class CyclesUsed:
    """Cycles of a training client, from the first in which it had work to the last.

    Attributes:
        used: Cycles in which it did work.
        wasted: Cycles between them in which it had nothing ready.
        steps: optim_steps it took.
    """

    used: int = 0
    wasted: int = 0
    steps: int = 0


class NoClock:
    """Everything may run at once."""

    cycle_s: float | None = None
    ticks: int = 0

    def tick(self, waiting: Mapping[str, Sequence[bool]]) -> None:
        pass

    def may_run(self, lane: str) -> bool:
        return True

    def done(self, lane: str) -> None:
        pass

    def next_tick_in_s(self) -> float | None:
        return None

    def cycles(self) -> Mapping[str, CyclesUsed]:
        return {}


class CycleClock:
    """Ticks every `cycle_s` seconds."""

    def __init__(self, cycle_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.cycle_s: float | None = cycle_s
        self.ticks = 0
        self._now = now
        self._start = now()
        self._every_s = cycle_s
        self._released: dict[str, int] = {}  # jobs of a lane that may still run in this cycle
        self._last_used: dict[str, int] = {}  # the tick at which a lane last had work
        self._cycles: dict[str, CyclesUsed] = {}

    def tick(self, waiting: Mapping[str, Sequence[bool]]) -> None:
        ticks = self._ticks_by_now()
        if ticks == self.ticks:
            return
        self.ticks = ticks
        for lane, ends_step in waiting.items():
            if self._released.get(lane, 0) > 0:
                self._last_used[lane] = ticks  # a step that takes longer than a cycle
            elif ends_step:
                self._release(lane, ends_step)

    def may_run(self, lane: str) -> bool:
        return self._released.get(lane, 0) > 0

    def done(self, lane: str) -> None:
        self._released[lane] -= 1
        self._last_used[lane] = self._ticks_by_now()  # a job may take longer than a cycle

    def next_tick_in_s(self) -> float | None:
        return max(0.0, self._start + (self.ticks + 1) * self._every_s - self._now())

    def cycles(self) -> Mapping[str, CyclesUsed]:
        return dict(self._cycles)

    def _ticks_by_now(self) -> int:
        return int((self._now() - self._start) / self._every_s)

    def _release(self, lane: str, ends_step: Sequence[bool]) -> None:
        has_step = True in ends_step
        self._released[lane] = ends_step.index(True) + 1 if has_step else len(ends_step)
        so_far = self._cycles.get(lane, CyclesUsed())
        idle = self.ticks - self._last_used.get(lane, self.ticks - 1) - 1
        self._cycles[lane] = CyclesUsed(
            so_far.used + 1, so_far.wasted + idle, so_far.steps + has_step
        )
        self._last_used[lane] = self.ticks
