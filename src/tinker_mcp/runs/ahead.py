"""Batches that are made ahead of their steps, each paid for before it is begun."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tinker_mcp.runs.attempt import Attempt, Outcome

if TYPE_CHECKING:
    import tinker

T = TypeVar("T")
U = TypeVar("U")

_LOOK_S = 0.5


@dataclass(frozen=True)
class Bill:
    """Tokens, and what they cost."""

    tokens: int
    usd: float

    def __add__(self, other: Bill) -> Bill:
        return Bill(self.tokens + other.tokens, self.usd + other.usd)

    def __sub__(self, other: Bill) -> Bill:
        return Bill(self.tokens - other.tokens, self.usd - other.usd)


@dataclass
class Ahead(Generic[T]):
    """The batches that are on their way, in the order of their steps.

    Attributes:
        start: Starts a task, which ends with the attempt.
        bound: What the batch of a step, counted from 1, costs at most.
        make: Makes it, with a sampler, from the step whose weights that has; and what it cost.
    """

    attempt: Attempt
    start: Callable[[Any], asyncio.Task[Any]]
    bound: Callable[[int], Bill]
    make: Callable[[int, tinker.SamplingClient, int], Coroutine[Any, Any, tuple[T, Bill]]]
    _coming: deque[asyncio.Task[T]] = field(init=False, default_factory=deque)
    _begun: int = field(init=False)  # the last step whose batch has been begun
    _refused: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self._begun = self.attempt.first_step

    @property
    def needs_weights(self) -> bool:
        """Whether a batch is still to be begun."""
        return self._begun < self.attempt.spec.steps

    def go_on(
        self, until: int, sampler: asyncio.Task[tinker.SamplingClient], weights_step: int
    ) -> None:
        """Begin the batches up to a step, as far as the money goes."""
        while self._begun < min(until, self.attempt.spec.steps) and not self._refused:
            step = self._begun + 1
            bound = self.bound(step)
            if not self.affords(bound):
                spec, spent = self.attempt.spec, self.attempt.journal.spent_usd
                self._refused = (
                    f"Sampling for step {step} could cost ${bound.usd:.4f}, and of max_usd "
                    f"${spec.max_usd:.2f} ${spent:.4f} are spent."
                )
                return
            self._begun = step

            async def made(step: int = step) -> tuple[T, Bill]:
                return await self.make(step, await asyncio.shield(sampler), weights_step)

            self._coming.append(self.start(self.paid(made(), bound)))

    async def next(self) -> T | None:
        """The batch of the step to come; None where the run is to end before it is there."""
        attempt = self.attempt
        if not self._coming:
            attempt.outcome = attempt.outcome or Outcome("stopped", "budget", self._refused)
            return None
        task = self._coming[0]

        async def come_or_stopped() -> None:
            while not task.done() and not attempt.journal.stop_asked:
                await asyncio.wait({task}, timeout=_LOOK_S)
                await attempt.room()  # the numbers of the step before

        with attempt.telling_divergence():
            await attempt.answer(come_or_stopped())
            if task.done():
                self._coming.popleft()
                return task.result()
        return None

    def affords(self, bill: Bill) -> bool:
        """Whether so much more is within max_usd."""
        limit = self.attempt.spec.max_usd
        return limit is None or self.attempt.journal.spent_usd + bill.usd <= limit

    def paid(
        self, work: Coroutine[Any, Any, tuple[U, Bill]], bound: Bill
    ) -> Coroutine[Any, Any, U]:
        """Work that is charged with `bound` now, and with what it cost once that is known."""
        self._charge(bound)

        async def corrected() -> U:
            try:
                result, cost = await work
            except Exception:  # what is cancelled is computed, and billed, all the same
                self._charge(Bill(0, 0.0) - bound)
                raise
            self._charge(cost - bound)
            return result

        return corrected()

    def _charge(self, bill: Bill) -> None:
        self.attempt.journal.spend(bill.tokens, bill.usd)
