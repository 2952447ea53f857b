"""How much a request may send: more is refused, and never held in memory.

A refused body is read to its end in pieces that are thrown away, since a client that is still
sending does not read the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinker_local.errors import UserInputError
from tinker_local.service import wire
from tinker_local.service.backend import backend_of
from tinker_local.service.endpoints.bodies import promised
from tinker_local.service.wire.turns import Turn, turn_in_json, turn_in_protobuf

JSON_LIMIT_BYTES = 4 * 2**20
LIMITS_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "/api/v1/forward_backward": wire.MAX_BODY_BYTES,
        "/api/v1/asample": 16 * 2**20,  # a prompt of a million tokens, as text, has 8 MB
    }
)
DISCARD_LIMIT_BYTES = 2**30
"""A client that sends even more finds its connection closed."""

_HEAD_BYTES = 256 * 2**10  # zstd unpacks whole blocks, of at most 128 KiB (RFC 8878, 3.1.1.2)


class BodyTooLargeError(UserInputError):
    """A body over the limit; `turn` is its place in its client's order, if it has one."""

    def __init__(self, path: str, limit: int, turn: Turn | None) -> None:
        super().__init__(
            f"The body for {path} is larger than {limit / 2**20:g} MiB.",
            "Send less at once: fewer datums, a shorter prompt.",
        )
        self.turn = turn


class BodyLimits:
    """Raises BodyTooLargeError in whoever reads a body that is too large."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Mapping[str, int] = LIMITS_BYTES,
        default: int = JSON_LIMIT_BYTES,
    ) -> None:
        self._app = app
        self._limits = limits
        self._default = default

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            limit = self._limits.get(scope["path"], self._default)
            receive = _LimitedBody(scope, receive, limit).receive
        await self._app(scope, receive, send)


class _LimitedBody:
    """One request's body, counted as it comes."""

    def __init__(self, scope: Scope, receive: Receive, limit: int) -> None:
        self._headers = Headers(scope=scope)
        self._path: str = scope["path"]
        self._receive = receive
        self._limit = limit
        self._declared = int(self._headers.get("content-length", 0))
        self._received = 0
        self._head = b""

    async def receive(self) -> Message:
        message = await self._receive()
        self._count(message)
        if self._declared <= self._limit and self._received <= self._limit:
            return message
        turn = self._turn()
        while message.get("more_body") and self._received <= DISCARD_LIMIT_BYTES:
            message = await self._receive()
            self._count(message)
        raise BodyTooLargeError(self._path, self._limit, turn)

    def _count(self, message: Message) -> None:
        body: bytes = message.get("body", b"")
        self._received += len(body)
        self._head += body[: _HEAD_BYTES - len(self._head)]

    def _turn(self) -> Turn | None:
        if self._path != "/api/v1/forward_backward":
            return turn_in_json(self._head)
        is_compressed = self._headers.get("content-encoding") == "zstd"
        return turn_in_protobuf(self._head, is_compressed=is_compressed)


async def refuse_large(request: Request, error: Exception) -> Response:
    """413; or a failed future for a request with a turn, whose number would be missing else."""
    turn = error.turn if isinstance(error, BodyTooLargeError) else None
    if turn is None:
        return JSONResponse({"detail": str(error)}, 413)

    def work() -> NoReturn:
        raise error

    return promised(backend_of(request).promise_in_order(*turn, work))
