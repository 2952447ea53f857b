"""Who runs next on the engine: one compute thread, shared fairly.

The engine uses every core by itself, so two calls at the same time would only slow each other.
Instead they take turns. Training work comes in slices of about a second, from one training client
after the other; sampling advances by a token for all sequences at once. Where both have work, the
one that has had less of the thread's time is next, so each gets half of it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from tinker_local.errors import UserInputError
from tinker_local.ops import Engine, Sample, SampleOutput, Slices
from tinker_local.service.clock import Clock, NoClock
from tinker_local.service.futures import Failure, Future, Reply, failure

Work: TypeAlias = Callable[[], Reply | Slices[Reply]]

GAP_S = 30.0
"""Seconds that a request waits for one with a lower seq_id; the SDK sends them in milliseconds."""


_CANCELLED = Failure("The request was cancelled.", "user")


@dataclass
class Job:
    """Work for the compute thread, and the future that gets its result.

    Attributes:
        ends_step: True for an optim_step; see `clock`.
    """

    future: Future
    work: Work
    ends_step: bool = False
    _slices: Slices[Reply] | None = None

    def advance(self) -> Reply | Failure | None:
        """Run it, or its next slice; None if there are more."""
        if self.future.is_cancelled:
            if self._slices is not None:
                self._slices.close()
            return _CANCELLED
        try:
            if self._slices is None:
                result = self.work()
                if not isinstance(result, Generator):
                    return result
                self._slices = result
            next(self._slices)
        except StopIteration as end:
            reply: Reply = end.value
            return reply
        except Exception as error:  # one request's failure must not end the thread of all
            return failure(error)
        return None


@dataclass(frozen=True)
class SampleJob:
    """A request for samples: how to read it, and how to encode what comes of it."""

    future: Future
    read: Callable[[], Sample]
    encode: Callable[[SampleOutput], Reply]

    def outcome(self, result: SampleOutput | Exception) -> Reply | Failure:
        """What the client is told of what the engine made of it."""
        try:
            return failure(result) if isinstance(result, Exception) else self.encode(result)
        except Exception as error:  # one request's failure must not end the thread of all
            return failure(error)


@dataclass(frozen=True)
class Load:
    """What waits and what runs: training jobs by lane, requests for samples."""

    training: dict[str, int]
    samples: int


class Scheduler:
    """Runs jobs off the event loop."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock or NoClock()
        self._now = now
        self._engine = engine
        self._arrived: queue.SimpleQueue[tuple[str, Job] | SampleJob] = queue.SimpleQueue()
        self._lanes: dict[str, deque[Job]] = {}  # the next lane first
        self._samples: dict[str, SampleJob] = {}
        self._training_s = self._sampling_s = 0.0
        self._loop = asyncio.get_running_loop()
        # A daemon: a long step must not keep the process alive after SIGTERM.
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, lane: str, job: Job) -> None:
        """Queue a job behind those of the same lane, which is a training client's id."""
        self._arrived.put((lane, job))

    def sample(self, job: SampleJob) -> None:
        """Have a request for samples join those under way."""
        self._arrived.put(job)

    @property
    def load(self) -> Load:
        """A glance from another thread: what it saw may have changed."""
        lanes = {lane: len(jobs) for lane, jobs in list(self._lanes.items()) if jobs}
        return Load(lanes, len(self._samples))

    def _run(self) -> None:
        while not self._loop.is_closed():
            self._take_arrived()
            self._turn()

    def _take_arrived(self) -> None:
        """Put what has come into its place; where there is nothing else to do, wait for it."""
        is_idle = not self._samples and self._ready_lane() is None
        while True:
            try:
                arrived = self._arrived.get(is_idle, self.clock.next_tick_in_s())
            except queue.Empty:
                return
            is_idle = False
            if isinstance(arrived, SampleJob):
                self._start_sample(arrived)
            else:
                lane, job = arrived
                self._lanes.setdefault(lane, deque()).append(job)

    def _turn(self) -> None:
        """Give the engine to whoever has had less of it."""
        self.clock.tick(
            {lane: [job.ends_step for job in jobs] for lane, jobs in self._lanes.items()}
        )
        lane = self._ready_lane()
        if lane is None or not self._samples:
            self._training_s = self._sampling_s = 0.0
        started = self._now()
        if lane is not None and (not self._samples or self._training_s <= self._sampling_s):
            self._train(lane)
            self._training_s += self._now() - started
        elif self._samples:
            self._sample()
            self._sampling_s += self._now() - started

    def _ready_lane(self) -> str | None:
        return next((lane for lane in self._lanes if self.clock.may_run(lane)), None)

    def _train(self, lane: str) -> None:
        """Run a slice of a lane's first job; afterwards it is the other lanes' turn."""
        jobs = self._lanes.pop(lane)
        outcome = jobs[0].advance()
        if outcome is not None:
            self.clock.done(lane)
            self._settle(jobs.popleft().future, outcome)
        if jobs:
            self._lanes[lane] = jobs

    def _start_sample(self, job: SampleJob) -> None:
        if job.future.is_cancelled:
            self._settle(job.future, _CANCELLED)
            return
        ticket = job.future.request_id
        try:
            self._engine.start_sample(ticket, job.read())
        except Exception as error:
            self._settle(job.future, failure(error))
            return
        self._samples[ticket] = job

    def _sample(self) -> None:
        """Draw a token for every sequence under way."""
        for ticket in [t for t, job in self._samples.items() if job.future.is_cancelled]:
            self._stop_sample(ticket)
            self._settle(self._samples.pop(ticket).future, _CANCELLED)
        results: Mapping[str, SampleOutput | Exception]
        try:
            results = self._engine.continue_samples()
        except Exception as error:  # nobody knows which of them it was
            results = dict.fromkeys(self._samples, error)
            for ticket in results:
                self._stop_sample(ticket)
        for ticket, result in results.items():
            job = self._samples.pop(ticket)
            self._settle(job.future, job.outcome(result))

    def _stop_sample(self, ticket: str) -> None:
        try:
            self._engine.stop_sample(ticket)
        except Exception as error:  # logged; who asked is told that it was cancelled
            failure(error)

    def _settle(self, future: Future, outcome: Reply | Failure) -> None:
        try:
            self._loop.call_soon_threadsafe(future.resolve, outcome)
        except RuntimeError:  # the server ended while a job ran; see _run
            if not self._loop.is_closed():
                raise


@dataclass
class Sequencer:
    """Releases the requests of one training client in the order of their seq_id: 1, 2, 3 ...

    They may arrive in another order: the SDK sends the chunks of one forward_backward at once.
    The SDK counts on after an error, so a number may never come. After `gap_s` it is given up:
    `on_gap` is told, on the engine's thread when the requests before it are done, and those
    behind it run.
    """

    scheduler: Scheduler
    lane: str
    on_gap: Callable[[int], None] = lambda _: None
    gap_s: float = GAP_S
    _next: int = 1
    _held: dict[int, Job] = field(default_factory=dict)

    def submit(self, seq_id: int, job: Job) -> None:
        """Release the job in its turn; call on the event loop's thread.

        Raises:
            UserInputError: The number has been used.
        """
        if seq_id < self._next:
            raise UserInputError(
                f"seq_id {seq_id} has been used; the next is {self._next}.",
                "Number the requests of a training client 1, 2, 3 ...",
            )
        self._held[seq_id] = job
        self._release()
        self._expect()

    def _release(self) -> None:
        while self._next in self._held:
            self.scheduler.submit(self.lane, self._held.pop(self._next))
            self._next += 1

    def _expect(self) -> None:
        """Wait for the number that holds others back, if there is one."""
        if self._held:
            asyncio.get_running_loop().call_later(self.gap_s, self._give_up, self._next)

    def _give_up(self, missing: int) -> None:
        """Go on without a number that is still missing."""
        if self._next != missing or not self._held:
            return
        gap = Future(f"{self.lane}:{missing}", self.lane.partition(":")[0])
        self.scheduler.submit(self.lane, Job(gap, partial(self._tell_gap, missing)))
        self._next = min(self._held)
        self._release()
        self._expect()

    def _tell_gap(self, missing: int) -> Reply:
        self.on_gap(missing)
        return Reply(b"", "")
