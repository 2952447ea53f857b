"""MCP over streamable HTTP, at /mcp: for whoever holds the token, on this machine by default.

The token comes first: without it each request gets the same answer, whatever it asks for, before
its path, headers or body are looked at. Then the SDK compares Host and Origin with the names this
server has, so that no web page reaches it through a name of its own (DNS rebinding).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.server.lifecycle import Ending

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

log = structlog.get_logger()

PATH = "/mcp"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_STREAMS_END_S = 1  # open streams never end by themselves


@dataclass(frozen=True)
class Address:
    """Where to listen, and what callers may call it.

    Attributes:
        port: 0 finds a free one.
        names: Host names besides loopback's that requests may be addressed to.
    """

    host: str = "127.0.0.1"
    port: int = 0
    names: Sequence[str] = field(default=())

    @property
    def is_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")

    @property
    def bracketed(self) -> str:
        """The host as it stands in a URL."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def allowed_hosts(self) -> list[str]:
        """The names a request may be addressed to."""
        own = () if self.is_loopback else (self.bracketed, socket.gethostname())
        return list(dict.fromkeys([*LOOPBACK, *own, *self.names]))


class BearerGuard:
    """Lets through only what carries the token; tells the rest nothing, not even which path is."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._digest = _digest(f"Bearer {token}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_authorized(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _refuse(send)

    def _is_authorized(self, scope: Scope) -> bool:
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(shown) != 1:
            return False
        scheme, _, token = shown[0].partition(b" ")
        # Digests: comparing the tokens themselves would tell the length.
        digest = _digest(scheme.title() + b" " + token.strip())
        return hmac.compare_digest(digest, self._digest)


def create_app(server: MCPServer[Any], allowed_hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """The ASGI application of `server`, for callers that show a token elsewhere or need none."""
    from mcp.server.transport_security import TransportSecuritySettings

    with_ports = [f"{host}:*" for host in allowed_hosts]
    security = TransportSecuritySettings(
        allowed_hosts=[*allowed_hosts, *with_ports],
        allowed_origins=[
            f"{scheme}://{host}"
            for scheme in ("http", "https")
            for host in [*allowed_hosts, *with_ports]
        ],
    )
    return server.streamable_http_app(streamable_http_path=PATH, transport_security=security)


async def serve_http(server: MCPServer[Any], address: Address, token: str | None) -> None:
    """Serve until a signal comes; prints one JSON line to stdout when ready.

    The line holds the url, the pid and, if `token` is None, the token made for this process.
    It is written nowhere else.

    Raises:
        InvalidInputError: The address cannot be had, or is not loopback while no token was given.
    """
    if token is None and not address.is_loopback:
        raise InvalidInputError(
            f"--host {address.host} can be reached from other machines, and no token is set.",
            next_step="Set TINKER_MCP_TOKEN, or use 127.0.0.1.",
        )
    listener = _bind(address)
    url = f"http://{address.bracketed}:{listener.getsockname()[1]}{PATH}"
    ready = {"url": url, "pid": os.getpid()}
    if token is None:
        token = secrets.token_urlsafe(32)
        ready["token"] = token
    app = BearerGuard(create_app(server, address.allowed_hosts), token)
    await _AnnouncedServer(app, ready).serve(sockets=[listener])


class _AnnouncedServer(uvicorn.Server):
    """Tells where it is once it accepts connections; ends as the stdio server does."""

    def __init__(self, app: BearerGuard, ready: dict[str, Any]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=_STREAMS_END_S,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(json.dumps(self._ready) + "\n")
            sys.stdout.flush()
            log.info("serving", url=self._ready["url"])

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Instead of uvicorn's, which lets the process die by the signal in the end."""
        Ending(self._end).on_signals()
        yield

    def _end(self) -> None:
        # uvicorn tells of each stream that it cuts off, with a traceback.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.should_exit = True


async def _refuse(send: Send) -> None:
    headers = [(b"www-authenticate", b"Bearer"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _bind(address: Address) -> socket.socket:
    """Take the address; connections are refused until uvicorn listens on it.

    Raises:
        InvalidInputError: It cannot be had.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off; else each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
    except OSError as error:
        listener.close()
        raise InvalidInputError(
            f"Cannot listen on {address.host}:{address.port}: {error.strerror}.",
            next_step="Use --port 0, which finds a free one.",
        ) from None
    return listener
