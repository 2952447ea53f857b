"""Configuration, capabilities and sessions: the server half of `tinker/resources/service.py`."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from tinker_local.errors import LocalError, UserInputError
from tinker_local.ops import BaseWeights, SamplerWeights, SavedWeights
from tinker_local.service.backend import Backend, backend_of
from tinker_local.service.endpoints.bodies import field, parse
from tinker_local.service.sessions import Sampler

PROTOCOL = (0, 38)
"""The first SDK version that speaks the protocol served here."""

CLIENT_CONFIG = {
    "pjwt_auth_enabled": False,
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,  # loopback is faster than zstd
    "use_pyqwest_transport": False,  # one dependency less in the path, and a little faster here
    "sample_use_retrieve_futures": False,
    "sample_max_concurrent_requests": 64,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": False,
    "billing_exception_max_pause_duration_sec": 0,
}


async def healthz(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def client_config(request: Request) -> Response:
    """Feature flags; also where an SDK too old for this protocol is told so."""
    version = await field(request, "sdk_version")
    if _version(version) < PROTOCOL:
        raise UserInputError(
            f"tinker SDK {version or '(unknown)'} speaks an older protocol.",
            "Install tinker>=0.38,<0.39.",
        )
    return JSONResponse(CLIENT_CONFIG)


async def client_dynamic_config(_: Request) -> Response:
    return JSONResponse({"refresh_interval_sec": 300, "sample_cancel_enabled": True})


async def telemetry(_: Request) -> Response:
    """Accept and forget: nothing is reported anywhere."""
    return JSONResponse({"status": "accepted"})


async def get_server_capabilities(request: Request) -> Response:
    models = backend_of(request).engine.base_models()
    return JSONResponse(
        {
            "supported_models": [
                {
                    "model_name": model.name,
                    "max_context_length": model.max_context_length,
                    "trainable": True,
                    "sampleable": True,
                }
                for model in models
            ]
        }
    )


async def create_session(request: Request) -> Response:
    wanted = await parse(request, types.CreateSessionRequest)
    session = backend_of(request).sessions.open(wanted.user_metadata)
    return JSONResponse({"type": "create_session", "session_id": session.session_id})


async def session_heartbeat(request: Request) -> Response:
    """Note that the client lives; 410, which ends its heartbeats, for a session not open here."""
    wanted = await parse(request, types.SessionHeartbeatRequest)
    try:
        session = backend_of(request).sessions.get(wanted.session_id)
    except LocalError as error:
        return JSONResponse({"detail": str(error)}, 410)
    session.seen_at = time.monotonic()
    return JSONResponse({"type": "session_heartbeat"})


async def finish_session(request: Request) -> Response:
    backend_of(request).finish_session(request.path_params["session_id"])
    return Response(status_code=204)


async def create_sampling_session(request: Request) -> Response:
    """Open a sampling client on a base model or a checkpoint."""
    backend = backend_of(request)
    wanted = await parse(request, types.CreateSamplingSessionRequest)
    session = backend.sessions.get(wanted.session_id)
    sampler_id = f"{wanted.session_id}:sample:{wanted.sampling_session_seq_id}"
    weights = _weights(backend, wanted)
    session.samplers[sampler_id] = Sampler(
        sampler_id, session.session_id, weights, wanted.model_path
    )
    return JSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler_id})


async def get_sampler(request: Request) -> Response:
    sampler = backend_of(request).sessions.sampler(request.path_params["sampler_id"])
    return JSONResponse(
        {
            "sampler_id": sampler.sampler_id,
            "base_model": sampler.weights.base_model,
            "model_path": sampler.model_path,
        }
    )


def _weights(backend: Backend, wanted: types.CreateSamplingSessionRequest) -> SamplerWeights:
    if wanted.model_path is not None:
        checkpoint = backend.catalog.get(wanted.model_path)
        base_model = backend.catalog.run(checkpoint.run_id).base_model
        return SavedWeights(base_model, backend.catalog.folder(checkpoint))
    served = [model.name for model in backend.engine.base_models()]
    if wanted.base_model not in served:
        raise UserInputError(
            f"The base model {wanted.base_model!r} is not served here.",
            f"Use one of: {', '.join(served)}.",
        )
    return BaseWeights(wanted.base_model)


def _version(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(p.isdigit() for p in parts) else (0,)
