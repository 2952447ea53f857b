"""Request bodies to typed requests, and refusals to HTTP."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_local.errors import LocalError, NotFoundError, UserInputError
from tinker_local.service.futures import Future

RequestT = TypeVar("RequestT", bound=BaseModel)


async def parse(request: Request, model: type[RequestT]) -> RequestT:
    """The body as one of the SDK's own request types.

    Raises:
        UserInputError: It does not fit, naming each field.
    """
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise UserInputError(
            f"{request.url.path} cannot read its body ({wrong}).", "Use the tinker SDK 0.38."
        ) from None


def promised(future: Future) -> Response:
    """The answer to an accepted request."""
    return JSONResponse({"request_id": future.request_id})


async def refuse(_: Request, error: Exception) -> Response:
    """A LocalError that concerns no future, as the SDK expects it: {"detail"}."""
    assert isinstance(error, LocalError)  # noqa: S101 - registered for LocalError alone
    return JSONResponse({"detail": str(error)}, 404 if isinstance(error, NotFoundError) else 400)
