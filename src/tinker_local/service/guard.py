"""Who may speak to the server: loopback names, no foreign web page, the key.

A port on 127.0.0.1 can be reached by every process of the machine and, through DNS rebinding or
a plain form, by any web page its user opens; hence all three checks.
"""

from __future__ import annotations

import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
HEALTH_PATHS = frozenset({"/healthz", "/api/v1/healthz"})


class Guard:
    """Refuses what fails a check; notes when the last request with the key came."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.used_at = time.monotonic()
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            status, detail = refusal
            await JSONResponse({"detail": detail}, status)(scope, receive, send)
            return
        if scope["path"] not in HEALTH_PATHS:
            self.used_at = time.monotonic()
        await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> tuple[int, str] | None:
        if not _is_loopback(f"//{headers.get('host', '')}"):
            return 403, "tinker-local answers to 127.0.0.1, localhost and [::1] only."
        if "origin" in headers and not _is_loopback(headers["origin"]):
            return 403, "tinker-local does not answer web pages of other hosts."
        key = headers.get("x-api-key", "").encode()
        if path not in HEALTH_PATHS and not secrets.compare_digest(key, self._api_key):
            return 401, (
                "The API key is missing or wrong. `tinker-local env` prints the running server's."
            )
        return None


def _is_loopback(url: str) -> bool:
    try:
        return urlsplit(url).hostname in LOOPBACK_NAMES
    except ValueError:
        return False
