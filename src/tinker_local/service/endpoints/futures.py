"""Fetching results: the server half of `tinker/resources/futures.py`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from tinker_local.service import wire
from tinker_local.service.backend import backend_of
from tinker_local.service.endpoints.bodies import field, parse
from tinker_local.service.futures import Failure

LONG_POLL_S = 20.0
"""The SDK's HTTP client gives up after 45 s, and asks again at once after each answer."""


async def retrieve_future(request: Request) -> Response:
    """Wait for a result, at most LONG_POLL_S; 408 asks the SDK to come again."""
    wanted = await parse(request, types.FutureRetrieveRequest)
    future = backend_of(request).futures.get(wanted.request_id)
    if future is None:
        lost = Failure(
            f"No request {wanted.request_id!r}: this server has been restarted since, or its "
            "result is older than 15 minutes. Make new clients from the last saved state.",
            "user",
        )
        return JSONResponse(wire.failure_body(lost))
    outcome = await future.wait(LONG_POLL_S)
    if outcome is None:
        again = {
            "type": "try_again",
            "request_id": wanted.request_id,
            "queue_state": "active",
        }
        return JSONResponse(again, 408)
    if isinstance(outcome, Failure):
        return JSONResponse(wire.failure_body(outcome))
    return Response(outcome.body, media_type=outcome.content_type)


async def cancel_future(request: Request) -> Response:
    """Note that nobody waits for a sample any more; it stops before its next token."""
    future = backend_of(request).futures.get(await field(request, "request_id"))
    if future is not None:
        future.is_cancelled = True
    return Response(status_code=204)
