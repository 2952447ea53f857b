"""Who may speak to the server: loopback names, no foreign web page, the key or a token of it.

A port on 127.0.0.1 can be reached by every process of the machine and, through DNS rebinding or
a plain form, by any web page its user opens; hence all three checks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tinker_local.service.identity import Identity, Verdict

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
HEALTH_PATHS = frozenset({"/healthz", "/api/v1/healthz"})
DOWNLOADS = "/api/v1/downloads/"
"""Below it, the token in the path decides (endpoints.downloads)."""


class Guard:
    """Refuses what fails a check; notes when the last request with the key came."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.used_at = time.monotonic()
        self._identity = Identity(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if _needs_key(scope["path"]):
            self.used_at = time.monotonic()
        scope.setdefault("state", {})["identity"] = self._identity
        await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        if not _is_loopback(f"//{headers.get('host', '')}"):
            return _refused(403, "tinker-local answers to 127.0.0.1, localhost and [::1] only.")
        if "origin" in headers and not _is_loopback(headers["origin"]):
            return _refused(403, "tinker-local does not answer web pages of other hosts.")
        if not _needs_key(path):
            return None
        return _REFUSALS[self._identity.check(headers.get("x-api-key", ""))]


def _refused(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status)


_REFUSALS: Mapping[Verdict, Response | None] = MappingProxyType(
    {
        Verdict.VALID: None,
        # These words make the SDK exchange its key for a new token (SDK 0.38, lib/_jwt_auth.py).
        Verdict.EXPIRED: JSONResponse(
            {"detail": "The token has expired. Exchange the API key for a new one."},
            401,
            {"WWW-Authenticate": 'Bearer error="invalid_token"'},
        ),
        Verdict.UNKNOWN: JSONResponse(
            {
                "detail": "The API key is missing or wrong. `tinker-local env` prints the running "
                "server's, which is new at each start; clients of the server before are lost "
                "with it, and are made anew from their last saved state."
            },
            401,
        ),
    }
)


def _needs_key(path: str) -> bool:
    return path not in HEALTH_PATHS and not path.startswith(DOWNLOADS)


def _is_loopback(url: str) -> bool:
    try:
        return urlsplit(url).hostname in LOOPBACK_NAMES
    except ValueError:
        return False
