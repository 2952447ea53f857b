"""The route table, and what runs beside the requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinker_local.errors import LocalError
from tinker_local.ops import Engine
from tinker_local.service.audit import AuditLog, audit_of
from tinker_local.service.backend import Backend
from tinker_local.service.body_limits import BodyLimits, BodyTooLargeError, refuse_large
from tinker_local.service.checkpoints import Catalog
from tinker_local.service.clock import Clock
from tinker_local.service.downloads import Grants
from tinker_local.service.endpoints import (
    account,
    billing,
    checkpoints,
    downloads,
    futures,
    models,
    sampling,
    service,
    sessions,
    stats,
    training,
    weights,
)
from tinker_local.service.endpoints.bodies import refuse
from tinker_local.service.journal import SessionJournal
from tinker_local.service.scheduler import GAP_S, Scheduler
from tinker_local.service.sessions import LOST_AFTER_S, SessionRegistry
from tinker_local.service.usage import UsageLedger

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

_CHECKPOINTS = "/training_runs/{run_id}/checkpoints"
_CHECKPOINT = _CHECKPOINTS + "/{kind}/{name}"
_SWEEP_S = 1.0

# (method, path under /api/v1, endpoint)
ROUTES = (
    ("GET", "/healthz", service.healthz),
    ("POST", "/client/config", service.client_config),
    ("POST", "/client/dynamic_config", service.client_dynamic_config),
    ("POST", "/telemetry", service.telemetry),
    ("GET", "/get_server_capabilities", service.get_server_capabilities),
    ("POST", "/auth/token", account.auth_token),
    ("GET", "/auth/apikey/me", account.api_key),
    ("GET", "/audit", account.audit_log),
    ("GET", "/billing/usage/events", billing.usage_events),
    ("GET", "/billing/usage/checkpoints/current", billing.checkpoint_storage),
    ("POST", "/create_session", sessions.create_session),
    ("POST", "/session_heartbeat", sessions.session_heartbeat),
    ("GET", "/sessions", sessions.list_sessions),
    ("POST", "/sessions/search", sessions.search_sessions),
    ("GET", "/sessions/{session_id}", sessions.get_session),
    ("POST", "/sessions/{session_id}/finish", sessions.finish_session),
    ("PUT", "/sessions/{session_id}/project", sessions.assign_project),
    ("POST", "/create_sampling_session", sessions.create_sampling_session),
    ("POST", "/join_sampling_session", sessions.join_sampling_session),
    ("GET", "/samplers/{sampler_id}", sessions.get_sampler),
    ("POST", "/create_model", models.create_model),
    ("POST", "/load_weights", models.load_weights),
    ("POST", "/get_info", models.get_info),
    ("POST", "/forward_backward", training.forward_backward),
    ("POST", "/optim_step", training.optim_step),
    ("POST", "/save_weights", weights.save_weights),
    ("POST", "/save_weights_for_sampler", weights.save_weights_for_sampler),
    ("POST", "/save_weights_external", weights.save_weights_external),
    ("POST", "/weights_info", checkpoints.weights_info),
    ("POST", "/copy_weights", checkpoints.copy_weights),
    ("GET", "/training_runs", checkpoints.list_runs),
    ("GET", "/training_runs/{run_id}", checkpoints.get_run),
    ("GET", "/checkpoints", checkpoints.list_checkpoints),
    ("GET", _CHECKPOINTS, checkpoints.list_run_checkpoints),
    ("DELETE", _CHECKPOINT, checkpoints.delete_checkpoint),
    ("POST", _CHECKPOINT + "/publish", checkpoints.publish_checkpoint),
    ("DELETE", _CHECKPOINT + "/publish", checkpoints.unpublish_checkpoint),
    ("PUT", _CHECKPOINT + "/ttl", checkpoints.set_checkpoint_ttl),
    ("GET", _CHECKPOINT + "/external_weights_urls", downloads.external_weights_urls),
    ("GET", "/downloads/{token}/{name}", downloads.download),
    ("POST", "/asample", sampling.asample),
    ("POST", "/retrieve_future", futures.retrieve_future),
    ("POST", "/cancel_future", futures.cancel_future),
)

# (method, path under /api/v1, why): answered with 404, which the SDK raises at once; it would
# repeat a 501 for five minutes.
REFUSED = (
    (
        "DELETE",
        "/auth/apikey/me",
        "The key belongs to the running server and ends with it: end the server instead.",
    ),
    (
        "GET",
        "/sessions/{session_id}/trace_export",
        "tinker-local keeps no timeline of requests; GET /stats tells what it is doing.",
    ),
    (
        "POST",
        "/create_custom_loss",
        "tinker-local does not run custom losses on the server. The SDK computes them in its own "
        "process: pass the callable to forward_backward_custom.",
    ),
    (
        "POST",
        "/retrieve_futures",
        "tinker-local answers for one request at a time, at retrieve_future; its client/config "
        "says so.",
    ),
)

# What a request that changes a checkpoint is called in the audit log.
_AUDITED = {
    ("DELETE", _CHECKPOINT): "checkpoint_delete",
    ("POST", _CHECKPOINT + "/publish"): "checkpoint_publish",
    ("DELETE", _CHECKPOINT + "/publish"): "checkpoint_unpublish",
    ("PUT", _CHECKPOINT + "/ttl"): "checkpoint_set_ttl",
    ("GET", _CHECKPOINT + "/external_weights_urls"): "checkpoint_read",
}


def create_app(
    engine: Engine,
    state_dir: Path,
    *,
    lost_after_s: float = LOST_AFTER_S,
    look_for_lost_s: float = 60.0,
    save_usage_s: float = 1.0,
    clock: Clock | None = None,
    gap_s: float = GAP_S,
) -> Starlette:
    """The application; wrap it in `guard.Guard` before it is served.

    Args:
        lost_after_s: A session without a heartbeat for so long is finished.
        look_for_lost_s: Seconds between two looks for such sessions.
        save_usage_s: Seconds between two writes of the counted tokens.
        clock: When training work may run; by default always.
        gap_s: Seconds that a training client's request waits for one with a lower seq_id.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        catalog = Catalog(state_dir)
        registry = SessionRegistry(
            SessionJournal(state_dir), partial(_newest_state, catalog), lost_after_s
        )
        app.state.backend = Backend(
            engine, catalog, Scheduler(engine, clock), registry, gap_s=gap_s
        )
        app.state.usage = UsageLedger(state_dir)
        app.state.audit = AuditLog(state_dir)
        app.state.grants = Grants()
        sweeper = asyncio.create_task(_finish_lost_sessions(app.state.backend, look_for_lost_s))
        saver = asyncio.create_task(_save_usage(app.state.usage, save_usage_s))
        remover = asyncio.create_task(_remove_expired(app.state.backend.catalog))
        yield
        sweeper.cancel()
        remover.cancel()
        saver.cancel()
        app.state.usage.flush()

    routes: list[BaseRoute] = [
        Route(f"/api/v1{path}", _audited(method, path, endpoint), methods=[method])
        for method, path, endpoint in ROUTES
    ]
    routes += [
        Route(f"/api/v1{path}", partial(_refused, reason), methods=[method])
        for method, path, reason in REFUSED
    ]
    routes.append(Route("/healthz", service.healthz))
    routes.append(Route("/stats", stats.stats))
    routes.append(Route("/{path:path}", _not_served, methods=["GET", "POST", "PUT", "DELETE"]))
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(BodyLimits)],
        exception_handlers={LocalError: refuse, BodyTooLargeError: refuse_large},
    )


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


async def _refused(reason: str, _: Request) -> Response:
    return JSONResponse({"detail": reason}, 404)


def _audited(method: str, path: str, endpoint: Endpoint) -> Endpoint:
    """An endpoint that leaves an entry in the audit log when it has done what was asked."""
    event = _AUDITED.get((method, path))
    if event is None:
        return endpoint

    async def recorded(request: Request) -> Response:
        response = await endpoint(request)
        audit_of(request).record(event, tinker_path=checkpoints.path_of(request))
        return response

    return recorded


def _newest_state(catalog: Catalog, run_id: str) -> str | None:
    """The tinker:// path of a run's newest saved state, if it has one."""
    try:
        saved = catalog.of_run(run_id)
    except LocalError:
        return None
    return next((checkpoint.path for checkpoint in saved if checkpoint.kind == "weights"), None)


async def _save_usage(usage: UsageLedger, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        await asyncio.to_thread(usage.flush)


async def _finish_lost_sessions(backend: Backend, look_every_s: float) -> None:
    while True:
        await asyncio.sleep(look_every_s)
        for session in backend.sessions.lost():
            backend.sessions.finish(session.session_id, "interrupted", "Its client went silent.")
            backend.finish_session(session.session_id)


async def _remove_expired(catalog: Catalog) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        if catalog.has_expired:
            await asyncio.to_thread(catalog.sweep)
