"""Request bodies to typed requests, and refusals to HTTP."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_local.errors import NotFoundError, UserInputError
from tinker_local.service.backend import backend_of
from tinker_local.service.futures import Future

RequestT = TypeVar("RequestT", bound=BaseModel)


class UnreadableTurnError(UserInputError):
    """A request that cannot be read, but whose place in its client's order is known."""

    def __init__(self, error: UserInputError, model_id: str, seq_id: int) -> None:
        super().__init__(error.problem, error.next_step)
        self.model_id = model_id
        self.seq_id = seq_id


async def parse(request: Request, model: type[RequestT]) -> RequestT:
    """The body as one of the SDK's own request types.

    Raises:
        UserInputError: It does not fit, naming each field.
        UnreadableTurnError: The same, for a request that has a seq_id.
    """
    body = await request.body()
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
    refusal = UserInputError(
        f"{request.url.path} cannot read its body ({wrong}).",
        "Check the values, and that the client is the tinker SDK 0.38.",
    )
    turn = _turn(body)
    raise refusal if turn is None else UnreadableTurnError(refusal, *turn)


async def field(request: Request, name: str) -> str:
    """One field of a body for which the SDK has no request type; "" if it is missing.

    Raises:
        UserInputError: The body is no JSON object.
    """
    body = _json_object(await request.body())
    if body is None:
        raise UserInputError(
            f"{request.url.path} needs a JSON object as its body.", "Use the tinker SDK 0.38."
        )
    return str(body.get(name, ""))


def promised(future: Future) -> Response:
    """The answer to an accepted request."""
    return JSONResponse({"request_id": future.request_id})


async def refuse(request: Request, error: Exception) -> Response:
    """Tell a LocalError that concerns no future, as the SDK expects it: {"detail"}.

    One that concerns a turn becomes a failed future instead: the SDK counts on after a refusal,
    and what it sends next would wait for the number that never came.
    """
    if isinstance(error, UnreadableTurnError):
        turn = error

        def work() -> NoReturn:
            raise turn

        backend = backend_of(request)
        return promised(backend.promise_in_order(turn.model_id, turn.seq_id, work))
    return JSONResponse({"detail": str(error)}, 404 if isinstance(error, NotFoundError) else 400)


def _turn(body: bytes) -> tuple[str, int] | None:
    """(model_id, seq_id) of a body, if it has them."""
    raw = _json_object(body)
    if raw is None:
        return None
    model_id, seq_id = raw.get("model_id"), raw.get("seq_id")
    return (model_id, seq_id) if isinstance(model_id, str) and isinstance(seq_id, int) else None


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
