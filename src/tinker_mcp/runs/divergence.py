"""Whether a run's losses say that it has gone wrong for good."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Literal

Verdict = Literal["calm", "suspicious", "diverged"]

WINDOW = 3
FACTOR = 3.0


class LossWatch:
    """Looks at each step's loss in turn.

    A run has diverged with a loss that is no number, or when the mean of its last WINDOW losses is
    above FACTOR times the lowest such mean so far and above the first loss. (The first losses
    count as means of one and of two, so that a run which explodes at once is seen to.) One loss
    above that limit is suspicious: it may be a hard batch, or the beginning of the end.

    Args:
        floor: Means below it count as so high, for a loss that may well come near 0 and leave.
    """

    def __init__(self, losses: Iterable[float] = (), floor: float = -math.inf) -> None:
        self._floor = floor
        self._first = self._lowest = math.inf
        self._last: deque[float] = deque(maxlen=WINDOW)
        for loss in losses:
            self.look(loss)

    @property
    def limit(self) -> float:
        """What a loss may not be above for long."""
        return max(FACTOR * max(self._lowest, self._floor), self._first)

    def look(self, loss: float) -> Verdict:
        """Take the next loss."""
        if not math.isfinite(loss):
            return "diverged"
        limit = self.limit
        self._last.append(loss)
        mean = sum(self._last) / len(self._last)
        if math.isinf(self._first):
            self._first = loss
        self._lowest = min(self._lowest, mean)
        if len(self._last) == WINDOW and mean > limit:
            return "diverged"
        return "suspicious" if loss > limit else "calm"
