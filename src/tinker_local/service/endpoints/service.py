"""Configuration and capabilities: the server half of `tinker/resources/service.py`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_local.errors import UserInputError
from tinker_local.service.backend import backend_of
from tinker_local.service.endpoints.bodies import field

PROTOCOL = (0, 38)
"""The first SDK version that speaks the protocol served here."""

CLIENT_CONFIG = {
    "pjwt_auth_enabled": True,  # whoami reads the claims of the JWT
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,  # loopback is faster than zstd
    "use_pyqwest_transport": False,  # one dependency less in the path, and a little faster here
    "sample_use_retrieve_futures": False,
    "sample_max_concurrent_requests": 64,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": True,
    "billing_exception_max_pause_duration_sec": 0,
}

_LAST: Mapping[str, str] = MappingProxyType({"Connection": "close"})
"""Of answers to clients that the SDK uses once and forgets open (SDK 0.38, _fetch_client_config,
and telemetry's last words). The finalizer of one with a connection runs in whatever thread collects
garbage, and may close a descriptor there that is another connection's by then: that one's answer is
never read, and the SDK asks again after 45 s."""


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
    return JSONResponse(CLIENT_CONFIG, headers=_LAST)


async def client_dynamic_config(_: Request) -> Response:
    return JSONResponse({"refresh_interval_sec": 300, "sample_cancel_enabled": True})


async def telemetry(_: Request) -> Response:
    """Accept and forget: nothing is reported anywhere."""
    return JSONResponse({"status": "accepted"}, headers=_LAST)


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


def _version(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(p.isdigit() for p in parts) else (0,)
