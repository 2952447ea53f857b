"""What every endpoint works on, and how a request becomes a promised result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from tinker_local.errors import LocalError
from tinker_local.ops import Engine, Sample, SampleOutput
from tinker_local.service.checkpoints import Catalog
from tinker_local.service.futures import Future, FutureStore, Reply, failure
from tinker_local.service.scheduler import GAP_S, Job, SampleJob, Scheduler, Work
from tinker_local.service.sessions import Sampler, SessionRegistry


@dataclass
class Backend:
    """The server's parts."""

    engine: Engine
    catalog: Catalog
    scheduler: Scheduler
    sessions: SessionRegistry = field(default_factory=SessionRegistry)
    futures: FutureStore = field(default_factory=FutureStore)
    gap_s: float = GAP_S

    def promise_model(self, model_id: str, work: Work) -> Future:
        """Queue the `work` that makes a training client.

        Here as below, the same request again gives the same future and no second run.
        """
        request_id = f"{model_id}:0"
        known = self.futures.get(request_id)
        if known is not None:
            return known
        future = self.futures.create(request_id, model_id.partition(":")[0])
        self.scheduler.submit(model_id, Job(future, work))
        return future

    def promise_sample(
        self,
        sampler: Sampler,
        seq_id: int,
        read: Callable[[], Sample],
        encode: Callable[[SampleOutput], Reply],
    ) -> Future:
        """Have what `read` returns join the samples under way."""
        request_id = f"{sampler.sampler_id}:{seq_id}"
        known = self.futures.get(request_id)
        if known is not None:
            return known
        future = self.futures.create(request_id, sampler.session_id)
        self.scheduler.sample(SampleJob(future, read, encode))
        return future

    def promise_in_order(
        self, model_id: str, seq_id: int, work: Work, *, ends_step: bool = False
    ) -> Future:
        """Queue `work` behind the client's requests with lower seq_id.

        An unknown client gives a future that fails: a refusal here would leave the SDK counting.
        """
        request_id = f"{model_id}:{seq_id}"
        known = self.futures.get(request_id)
        if known is not None:
            return known
        future = self.futures.create(request_id, model_id.partition(":")[0])
        try:
            self.sessions.model(model_id).sequencer.submit(seq_id, Job(future, work, ends_step))
        except LocalError as error:
            future.resolve(failure(error))
        return future

    def finish_session(self, session_id: str) -> None:
        """End a session and free what its clients hold; a finished one stays so.

        Raises:
            NotFoundError: This server never had it.
        """
        session = self.sessions.finish(session_id)
        self.futures.drop_session(session_id)

        def free() -> Reply:
            for model_id in session.models:
                self.engine.drop_model(model_id)
            for sampler_id in session.samplers:
                self.catalog.drop_ephemeral(sampler_id)
            session.models.clear()
            session.samplers.clear()
            return Reply(b"", "")

        # Behind whatever runs now: a client that is just being made is freed as well.
        finish = f"{session_id}:finish"
        self.scheduler.submit(finish, Job(Future(finish, session_id), free))


def backend_of(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend
