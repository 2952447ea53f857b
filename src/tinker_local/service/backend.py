"""What every endpoint works on, and how a request becomes a promised result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from tinker_local.errors import LocalError
from tinker_local.ops import Engine
from tinker_local.service.checkpoints import Catalog
from tinker_local.service.futures import Future, FutureStore, Reply, failure
from tinker_local.service.scheduler import Job, Scheduler
from tinker_local.service.sessions import SessionRegistry


@dataclass
class Backend:
    """The server's parts."""

    engine: Engine
    catalog: Catalog
    scheduler: Scheduler
    sessions: SessionRegistry = field(default_factory=SessionRegistry)
    futures: FutureStore = field(default_factory=FutureStore)

    def promise(self, request_id: str, session_id: str, work: Callable[[], Reply]) -> Future:
        """Queue `work`; the same request_id again gives the same future and no second run."""
        known = self.futures.get(request_id)
        if known is not None:
            return known
        future = self.futures.create(request_id, session_id)
        self.scheduler.submit(Job(future, work))
        return future

    def promise_in_order(self, model_id: str, seq_id: int, work: Callable[[], Reply]) -> Future:
        """Queue `work` behind the client's requests with lower seq_id.

        An unknown client gives a future that fails: a refusal here would leave the SDK counting.
        """
        request_id = f"{model_id}:{seq_id}"
        known = self.futures.get(request_id)
        if known is not None:
            return known
        future = self.futures.create(request_id, model_id.partition(":")[0])
        try:
            self.sessions.model(model_id).sequencer.submit(seq_id, Job(future, work))
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
        self.scheduler.submit(Job(Future(f"{session_id}:finish", session_id), free))


def backend_of(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend
