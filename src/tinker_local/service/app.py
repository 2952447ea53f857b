"""The route table, and what runs beside the requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinker_local.errors import LocalError
from tinker_local.ops import Engine
from tinker_local.service.backend import Backend
from tinker_local.service.checkpoints import Catalog
from tinker_local.service.endpoints import futures, models, sampling, service, training, weights
from tinker_local.service.endpoints.bodies import refuse
from tinker_local.service.scheduler import Scheduler

_CHECKPOINTS = "/training_runs/{run_id}/checkpoints"

# (method, path under /api/v1, endpoint)
ROUTES = (
    ("GET", "/healthz", service.healthz),
    ("POST", "/client/config", service.client_config),
    ("POST", "/client/dynamic_config", service.client_dynamic_config),
    ("POST", "/telemetry", service.telemetry),
    ("GET", "/get_server_capabilities", service.get_server_capabilities),
    ("POST", "/create_session", service.create_session),
    ("POST", "/session_heartbeat", service.session_heartbeat),
    ("POST", "/sessions/{session_id}/finish", service.finish_session),
    ("POST", "/create_sampling_session", service.create_sampling_session),
    ("GET", "/samplers/{sampler_id}", service.get_sampler),
    ("POST", "/create_model", models.create_model),
    ("POST", "/load_weights", models.load_weights),
    ("POST", "/get_info", models.get_info),
    ("POST", "/forward_backward", training.forward_backward),
    ("POST", "/optim_step", training.optim_step),
    ("POST", "/save_weights", weights.save_weights),
    ("POST", "/save_weights_for_sampler", weights.save_weights_for_sampler),
    ("POST", "/save_weights_external", weights.save_weights_external),
    ("POST", "/weights_info", weights.weights_info),
    ("GET", "/training_runs", weights.list_runs),
    ("GET", "/training_runs/{run_id}", weights.get_run),
    ("GET", "/checkpoints", weights.list_checkpoints),
    ("GET", _CHECKPOINTS, weights.list_run_checkpoints),
    ("DELETE", _CHECKPOINTS + "/{kind}/{name}", weights.delete_checkpoint),
    ("POST", "/asample", sampling.asample),
    ("POST", "/retrieve_future", futures.retrieve_future),
    ("POST", "/cancel_future", futures.cancel_future),
)


def create_app(engine: Engine, state_dir: Path) -> Starlette:
    """The application; wrap it in `guard.Guard` before it is served."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.backend = Backend(engine, Catalog(state_dir), Scheduler())
        sweeper = asyncio.create_task(_finish_lost_sessions(app.state.backend))
        yield
        sweeper.cancel()

    routes: list[BaseRoute] = [
        Route(f"/api/v1{path}", endpoint, methods=[method]) for method, path, endpoint in ROUTES
    ]
    routes.append(Route("/healthz", service.healthz))
    routes.append(Route("/{path:path}", _not_served, methods=["GET", "POST", "PUT", "DELETE"]))
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={LocalError: refuse})


def say_goodbye(app: Starlette) -> None:
    """Answer every long poll; the SDK would ask a server that is gone again for ever."""
    backend: Backend = app.state.backend
    backend.futures.fail_pending(
        "tinker-local was ended before this request was done. Start it again, and make new "
        "clients from the last saved state."
    )


async def _not_served(request: Request) -> Response:
    detail = f"tinker-local does not serve {request.method} {request.url.path}."
    return JSONResponse({"detail": detail}, 404)


async def _finish_lost_sessions(backend: Backend) -> None:
    while True:
        await asyncio.sleep(60)
        for session in backend.sessions.lost():
            backend.finish_session(session.session_id)
