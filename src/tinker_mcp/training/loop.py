"""Many steps with the futures overlapped, in portions that fit into a call.

While one batch is being computed, the next is already queued at the backend, so no clock cycle
passes empty. A loop can be left at any moment and goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from tinker_mcp.training.backend import Backend
from tinker_mcp.training.objectives import Objective
from tinker_mcp.training.waiting import abandon, wait

if TYPE_CHECKING:
    import tinker

T = TypeVar("T")

IN_FLIGHT = 2  # the batch being computed and the one behind it


@dataclass(frozen=True)
class TrainPlan:
    """What a `train` call asks for; equal plans are one loop."""

    data_id: str
    steps: int
    batch_size: int
    adam: tinker.AdamParams
    loss_fn: str
    seed: int
    loss_config: tuple[tuple[str, float], ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """Hashable identity."""
        return (
            self.data_id,
            self.steps,
            self.batch_size,
            self.adam.model_dump_json(),
            self.loss_fn,
            self.seed,
            self.loss_config,
        )


@dataclass(frozen=True)
class StepResult:
    """One finished step: its loss, and what else the loss and the optimizer tell."""

    step: int
    loss: float
    metrics: dict[str, float]


@dataclass
class _Submitted:
    batch: Sequence[tinker.Datum]
    forward_backward: asyncio.Task[Any]
    optim_step: asyncio.Task[Any]

    @property
    def tasks(self) -> set[asyncio.Task[Any]]:
        return {self.forward_backward, self.optim_step}


Report = Callable[[StepResult], Awaitable[None]]


@dataclass
class TrainLoop:
    """Takes `plan.steps` steps on `datums`; `results` has those that are done.

    Attributes:
        submitted: Steps sent to the backend, done or not.
        turn: Held by the call that advances it.
    """

    plan: TrainPlan
    datums: Sequence[tinker.Datum]
    client: tinker.TrainingClient
    objective: Objective
    results: list[StepResult] = field(default_factory=list)
    submitted: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _in_flight: deque[_Submitted] = field(default_factory=deque)
    _seconds_a_step: float | None = None

    @property
    def is_finished(self) -> bool:
        return len(self.results) == self.plan.steps

    def begin(self) -> None:
        """Submit a step if none is in flight and one is left."""
        if not self._in_flight and self.submitted < self.plan.steps:
            self._in_flight.append(self._submit())

    async def advance(self, backend: Backend, deadline: float, report: Report) -> None:
        """Go on until the plan is done or `deadline` (monotonic) is near.

        Raises:
            BackendUnreachableError: The backend stopped answering.
            Exception: What the SDK raises for a failed request; the loop cannot go on.
        """
        self.begin()  # however long a step takes: each call brings the loop on
        while not self.is_finished:
            self._fill(deadline)
            if not self._in_flight:
                return
            began = time.monotonic()
            head = self._in_flight[0]
            if not await wait(head.tasks, backend, deadline):
                return
            self._in_flight.popleft()
            try:
                self.results.append(self._result(head))
            except Exception:
                await self._settle(backend, deadline)
                raise
            self._seconds_a_step = time.monotonic() - began
            await report(self.results[-1])

    def close(self) -> None:
        """Stop waiting for what is in flight."""
        for submitted in self._in_flight:
            for task in submitted.tasks:
                abandon(task)
        self._in_flight.clear()

    async def _settle(self, backend: Backend, deadline: float) -> None:
        """After a failure: see how the steps behind it ended, since they ran all the same."""
        behind = list(self._in_flight)
        self._in_flight.clear()
        for submitted in behind:
            if await wait(submitted.tasks, backend, deadline):
                with contextlib.suppress(Exception):  # it failed too; the first failure is told
                    self.results.append(self._result(submitted))

    def _fill(self, deadline: float) -> None:
        while len(self._in_flight) < IN_FLIGHT and self.submitted < self.plan.steps:
            if not self._has_time(deadline):
                return
            self._in_flight.append(self._submit())

    def _has_time(self, deadline: float) -> bool:
        """Whether one step more is likely to end before the deadline, those in flight included."""
        if self._seconds_a_step is None:
            return True
        ahead = len(self._in_flight) + 1
        return time.monotonic() + ahead * self._seconds_a_step <= deadline

    def _submit(self) -> _Submitted:
        batch = self._batch()
        self.submitted += 1
        # Both before either is awaited: a request that misses a clock cycle costs one more.
        forward_backward = self.objective.forward_backward(self.client, batch)
        optim_step = self.client.optim_step(self.plan.adam)
        return _Submitted(batch, _watched(forward_backward), _watched(optim_step.coroutine()))

    def _batch(self) -> list[tinker.Datum]:
        size = self.objective.datums_a_unit
        units = [self.datums[i : i + size] for i in range(0, len(self.datums), size)]
        chosen = batch_of(units, self.plan.batch_size // size, self.submitted, self.plan.seed)
        return [datum for unit in chosen for datum in unit]

    def _result(self, submitted: _Submitted) -> StepResult:
        output = submitted.forward_backward.result()
        stepped = submitted.optim_step.result().metrics or {}
        return StepResult(
            len(self.results) + 1,
            self.objective.loss(output, submitted.batch),
            {**self.objective.metrics(output), **stepped},
        )


def _watched(request: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task whose failure nobody needs to ask for: of a step's two the first is told."""
    task = asyncio.create_task(request)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task


def batch_of(datums: Sequence[T], batch_size: int, step: int, seed: int) -> list[T]:
    """The batch of a step, counted from 0: each epoch is a new order chosen by `seed`.

    A batch takes up where the last one ended and runs over into the next epoch, so every datum is
    seen equally often.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [
        datums[_order(len(datums), seed, position // len(datums))[position % len(datums)]]
        for position in positions
    ]


@functools.lru_cache(maxsize=4)  # a batch asks for one or two, each of its positions again
def _order(count: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)  # noqa: S311 - an order, not a secret
    return order
