"""One attempt at a run: from its last checkpoint to its end, or to where it cannot go on.

Holds what all methods share: the client, the order of batches, the rate of each step, what is
recorded when, checkpoints, the budget, and the watch on the losses. The loop itself is the
method's. An attempt that fails raises; the next one begins with a client of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tinker_mcp.errors import RequestFailedError
from tinker_mcp.runs.divergence import LossWatch
from tinker_mcp.runs.pipeline import Pipeline
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.runs.states import StopReason
from tinker_mcp.store.rows import CheckpointRow
from tinker_mcp.training import sessions, waiting
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.datums import trained_tokens
from tinker_mcp.training.loop import batch_of
from tinker_mcp.training.sessions import NewClient

if TYPE_CHECKING:
    import tinker

    from tinker_mcp.runs.journal import Journal

T = TypeVar("T")

_NOT_FINITE = re.compile(r"\b(nan|inf|not finite|diverged)\b", re.IGNORECASE)

SILENCE_S = 10.0
"""After so long without an answer, a look whether the backend is there at all."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        detail: A sentence for whoever looks at the run.
    """

    state: Literal["completed", "stopped"]
    reason: StopReason | None
    detail: str


@dataclass
class Attempt:
    """What a method's `train` gets.

    Attributes:
        train: What the method's `load` gives: datums to train on, for dpo chosen, rejected,
            chosen, rejected ...; or prompts.
        held_out: The same to evaluate on; may be empty.
        start: The newest checkpoint; None begins at step 0.
        outcome: Set as soon as it is known that the attempt must end before its last step.
    """

    run_id: str
    spec: RunSpec
    train: Sequence[Any]
    held_out: Sequence[Any]
    journal: Journal
    backend: Backend
    start: CheckpointRow | None = None
    outcome: Outcome | None = field(init=False, default=None)
    _in_flight: Pipeline = field(init=False)
    _watch: LossWatch = field(init=False, default_factory=LossWatch)
    _loss: str = field(init=False, default="")  # the metric that is the run's loss
    _saved_at: int = field(init=False)  # the newest checkpoint that was submitted
    _kept: CheckpointRow | None = field(init=False)  # the newest one that was recorded
    _recorded_step: int = field(init=False)
    _unproven: list[CheckpointRow] = field(init=False, default_factory=list)
    _answered_at: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._in_flight = Pipeline(self.wait)
        self._saved_at = self._recorded_step = self.first_step
        self._kept = self.start

    @property
    def first_step(self) -> int:
        """Steps that were taken before this attempt."""
        return 0 if self.start is None else self.start.step

    # Clients

    @contextlib.asynccontextmanager
    async def opened(
        self, loss: str, floor: float = -math.inf
    ) -> AsyncIterator[tinker.TrainingClient]:
        """The client to train, at `first_step`; nothing is in flight when the block ends.

        Args:
            loss: The metric that is the run's loss.
            floor: As LossWatch has it.
        """
        self._loss = loss
        losses = (row.numbers[loss] for row in self.journal.metrics("train"))
        self._watch = LossWatch(losses, floor)
        async with self._open(self.start) as client, self._in_flight:
            self._answered_at = time.monotonic()
            yield client

    @contextlib.asynccontextmanager
    async def frozen_start(self) -> AsyncIterator[tinker.TrainingClient]:
        """A second client, with the weights that the run began with."""
        async with self._open(None) as client:
            yield client

    @contextlib.asynccontextmanager
    async def _open(self, start: CheckpointRow | None) -> AsyncIterator[tinker.TrainingClient]:
        new = NewClient(
            base_model=self.spec.base_model,
            checkpoint=self.spec.checkpoint if start is None else start.state_path,
            rank=self.spec.rank,
            seed=self.spec.seed,
            train_mlp=True,
            train_attn=True,
            train_unembed=True,
            load_optimizer=start is not None,
        )
        session = sessions.in_session(self.backend, new, self.run_id)
        client = await self.answer(session.__aenter__())
        try:
            yield client
        finally:
            await session.__aexit__(None, None, None)

    # Waiting

    async def answer(self, request: Any) -> Any:
        """The answer to one request, however long it takes.

        Raises:
            TinkerMcpError: It failed, or the backend is gone.
        """
        task = asyncio.ensure_future(request)
        try:
            await self.wait({task})
        except BaseException:
            waiting.abandon(task)
            raise
        return task.result()

    async def wait(self, tasks: set[asyncio.Task[Any]]) -> None:
        """Wait for tasks, for ever if need be; meanwhile the run is told to wait for its backend.

        Raises:
            BackendGoneError: The local backend has ended, and all in its memory with it. The hosted
                one keeps it: there the SDK tries again by itself, and gives up in the end.
        """
        is_silent = False
        watched = self.backend if self.backend.kind == "local" else None
        while not await waiting.wait(tasks, watched, time.monotonic() + SILENCE_S):
            absence = await self.backend.absence()
            if absence is not None and not is_silent:
                self.journal.waiting(absence.problem)
            elif absence is None and is_silent:
                self.journal.running()
            is_silent = absence is not None
        if is_silent:
            self.journal.running()

    # The step to come

    def batch(self, units: Sequence[T], step: int) -> list[T]:
        """The units of a step, counted from 1; the same whichever attempt asks."""
        return batch_of(units, self.spec.batch_size, step - 1, self.spec.seed)

    def adam(self, step: int) -> tinker.AdamParams:
        """The optimizer's parameters for a step, counted from 1."""
        import tinker

        return tinker.AdamParams(learning_rate=self.learning_rate(step))

    def learning_rate(self, step: int) -> float:
        """By the cookbook's schedules."""
        from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier

        spec = self.spec
        return spec.learning_rate * compute_schedule_lr_multiplier(
            spec.lr_schedule, step - 1, spec.steps
        )

    def must_end(self, step: int, tokens: int) -> bool:
        """Whether `step`, which would be billed as `tokens`, must not be submitted.

        Because somebody asked for a stop, it would cost too much, or the losses have diverged.
        """
        if self.outcome is None and self.journal.stop_asked is not None:
            how = {"save": "", "drop": ", without a checkpoint"}[self.journal.stop_asked]
            self.outcome = Outcome("stopped", "user", f"Stopped after step {step - 1}{how}.")
        return self.must_not_spend(f"Step {step}", tokens)

    def must_not_spend(self, what: str, tokens: int) -> bool:
        """Whether `what`, which would be billed as `tokens`, must not be submitted."""
        if self.outcome is None and not self.affords(tokens):
            self.outcome = Outcome(
                "stopped",
                "budget",
                f"{what} would cost ${self._usd(tokens):.4f}, and of max_usd "
                f"${self.spec.max_usd:.2f} ${self.journal.spent_usd:.4f} are spent.",
            )
        return self.outcome is not None

    def affords(self, tokens: int) -> bool:
        """Whether so many tokens more are within max_usd."""
        limit = self.spec.max_usd
        return limit is None or self.journal.spent_usd + self._usd(tokens) <= limit

    def _usd(self, tokens: int) -> float:
        return tokens * (self.spec.usd_per_million or 0.0) / 1e6

    # What is submitted, and recorded in its turn

    def put_step(
        self,
        step: int,
        batch: Sequence[tinker.Datum],
        requests: tuple[Any, Any],
        numbers: Callable[[tinker.ForwardBackwardOutput], Mapping[str, float]],
    ) -> None:
        """Take a step that was submitted: its forward_backward and its optim_step.

        Args:
            numbers: What the method measured, from the forward_backward's answer.
        """

        def record(output: tinker.ForwardBackwardOutput, stepped: tinker.OptimStepResponse) -> None:
            if self.outcome is not None and self.outcome.reason == "divergence":
                return  # of weights that are given up
            measured = numbers(output)
            now = time.monotonic()
            self.journal.step(
                step,
                {
                    **measured,
                    **(stepped.metrics or {}),
                    "learning_rate": self.learning_rate(step),
                    "num_sequences": len(batch),
                    "num_tokens": positions(batch),
                    "num_loss_tokens": sum(map(trained_tokens, batch)),
                    "progress": step / self.spec.steps,
                    "time/total": now - self._answered_at,
                },
            )
            self._answered_at, self._recorded_step = now, step
            self._judge(step, measured[self._loss])

        self._in_flight.put(*(r.coroutine() for r in requests), record=record, is_step=True)

    def put(self, request: Coroutine[Any, Any, T], record: Callable[[T], None]) -> None:
        """Take any other work; `record` gets its result once it is its turn."""
        self._in_flight.put(request, record=record)

    def is_eval_due(self, step: int) -> bool:
        """Whether the held-out set is to be scored with the weights after `step`."""
        every = self.spec.eval_every
        return step in (0, self.spec.steps) or (every > 0 and step % every == 0)

    def put_evaluation(
        self,
        step: int,
        submit: Callable[[list[tinker.Datum]], Any],
        numbers: Callable[[tinker.ForwardBackwardOutput], Mapping[str, float]],
    ) -> None:
        """Score the held-out set with the weights after `step`, which are those of this place."""
        if not self.held_out:
            return
        tokens = positions(self.held_out)
        if not self.affords(tokens):
            self.journal.warn(f"The evaluation at step {step} was left out: max_usd.")
            return
        self.journal.spend(tokens)

        def record(output: tinker.ForwardBackwardOutput) -> None:
            if self.outcome is not None and self.outcome.reason == "divergence":
                return
            measured = numbers(output)
            self.journal.evaluation(step, measured)
            if not all(map(math.isfinite, measured.values())):
                self._diverge(f"The held-out loss diverged: it is no number at step {step}.")

        self._in_flight.put(submit(list(self.held_out)).coroutine(), record=record)

    def is_save_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step`; the last one is `end`'s."""
        every = self.spec.save_every
        return every > 0 and step % every == 0 and step < self.spec.steps

    def put_checkpoint(
        self, client: tinker.TrainingClient, step: int, *, ttl_s: int | None, is_final: bool = False
    ) -> None:
        """Save state and sampler weights of the weights after `step`.

        Recorded only once the next loss shows that these weights are sound: nobody shall resume
        from diverged ones.
        """
        name = f"{self.run_id}-{step:06d}"
        self._saved_at = step
        requests = (
            client.save_state(name, ttl_seconds=ttl_s),
            client.save_weights_for_sampler(name, ttl_seconds=ttl_s),
        )

        def record(state: Any, sampler: Any) -> None:
            self._unproven.append(
                CheckpointRow(step, time.time(), str(state.path), str(sampler.path), is_final)
            )

        self._in_flight.put(*(r.coroutine() for r in requests), record=record)

    async def room(self) -> None:
        """Record what has been answered; wait while two steps are in flight.

        Raises:
            TinkerMcpError: A request failed, and the client is of no more use.
        """
        with self.telling_divergence():
            await self._in_flight.room()

    # The end

    async def end(self, client: tinker.TrainingClient, step: int) -> Outcome:
        """Save what is not saved, unless it shall not be; wait for all that is in flight.

        The last checkpoint of an attempt has no time to live, completed or stopped.
        """
        is_wanted = self.outcome is None or self._is_worth_keeping(self.outcome)
        if is_wanted and step > self._saved_at:
            is_final = step == self.spec.steps
            self.put_checkpoint(client, step, ttl_s=None, is_final=is_final)
        with self.telling_divergence():
            await self._in_flight.drain()
        if self.outcome is None or self.outcome.reason != "divergence":
            self._keep_checkpoints()
        return self.outcome or Outcome("completed", None, f"{step} steps. {self._newest('last')}")

    def _is_worth_keeping(self, outcome: Outcome) -> bool:
        return outcome.reason == "budget" or (
            outcome.reason == "user" and self.journal.stop_asked == "save"
        )

    def _judge(self, step: int, loss: float) -> None:
        verdict = self._watch.look(loss)
        if verdict == "diverged":
            self._diverge(f"The loss diverged: {loss:.4g} at step {step}.")
        elif verdict == "calm":
            self._keep_checkpoints()

    @contextlib.contextmanager
    def telling_divergence(self) -> Iterator[None]:
        """A backend that refuses to compute with NaN says the same as a loss that is one."""
        try:
            yield
        except RequestFailedError as error:
            if not _NOT_FINITE.search(error.problem):
                raise
            self._give_up_weights(f"The loss diverged after step {self._recorded_step}.")

    def _diverge(self, what: str) -> None:
        if self.spec.stops_on_divergence:
            self._give_up_weights(what)
        else:
            self.journal.warn(what)
            self._keep_checkpoints()

    def _give_up_weights(self, what: str) -> None:
        self._unproven.clear()
        self.outcome = Outcome("stopped", "divergence", f"{what} {self._newest('last good')}")

    def _keep_checkpoints(self) -> None:
        for row in self._unproven:
            self.journal.checkpoint(row.step, row.state_path, row.sampler_path, row.is_final)
            self._kept = row
        self._unproven.clear()

    def _newest(self, which: str) -> str:
        if self._kept is None:
            return "There is no checkpoint."
        return f"The {which} checkpoint, of step {self._kept.step}, is {self._kept.state_path}."


def positions(datums: Sequence[tinker.Datum]) -> int:
    """What is billed: target positions, trained or not."""
    return sum(datum.model_input.length for datum in datums)
