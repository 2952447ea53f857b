"""Who runs next on the engine: one compute thread, first come first served.

The engine uses every core by itself, so a second call at the same time would only slow both.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tinker_local.errors import UserInputError
from tinker_local.service.futures import Failure, Future, Reply, failure


@dataclass(frozen=True)
class Job:
    """Work for the compute thread, and the future that gets its result."""

    future: Future
    work: Callable[[], Reply]


class Scheduler:
    """Runs jobs one after the other, off the event loop."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        # A daemon: a long step must not keep the process alive after SIGTERM.
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            outcome = self._outcome(job)
            try:
                self._loop.call_soon_threadsafe(job.future.resolve, outcome)
            except RuntimeError:  # the loop is closed: the server ended while this job ran
                return

    @staticmethod
    def _outcome(job: Job) -> Reply | Failure:
        if job.future.is_cancelled:
            return Failure("The request was cancelled.", "user")
        try:
            return job.work()
        except Exception as error:  # one request's failure must not end the thread of all
            return failure(error)


@dataclass
class Sequencer:
    """Releases the requests of one training client in the order of their seq_id: 1, 2, 3 ...

    They may arrive in another order: the SDK sends the chunks of one forward_backward at once.
    Every number must be used up, by a failing job if need be: the SDK counts on after an error,
    and a gap would hold back all that follows.
    """

    scheduler: Scheduler
    _next: int = 1
    _held: dict[int, Job] = field(default_factory=dict)

    def submit(self, seq_id: int, job: Job) -> None:
        """Release the job in its turn.

        Raises:
            UserInputError: The number has been used.
        """
        if seq_id < self._next:
            raise UserInputError(
                f"seq_id {seq_id} has been used; the next is {self._next}.",
                "Number the requests of a training client 1, 2, 3 ...",
            )
        self._held[seq_id] = job
        while self._next in self._held:
            self.scheduler.submit(self._held.pop(self._next))
            self._next += 1
