"""The SDK's exceptions, told in the domain's terms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tinker_mcp.errors import (
    BackendUnreachableError,
    ClientLostError,
    NotFoundError,
    RequestFailedError,
    TinkerMcpError,
)

_LOST = re.compile(r"No (session|training client|sampling client|request) ")
_SDK_TAIL = re.compile(r" for self\.request_id=.*$", re.DOTALL)
_HTTP_NOT_FOUND = 404


@contextmanager
def told() -> Iterator[None]:
    """Turn an exception of the tinker SDK inside this block into a TinkerMcpError."""
    import tinker

    try:
        yield
    except TinkerMcpError:
        raise
    except tinker.RequestFailedError as error:
        raise _failed(_SDK_TAIL.sub("", str(error)).removeprefix("Request failed: ")) from error
    except tinker.APIStatusError as error:
        raise _refused(error) from error
    except tinker.APIConnectionError as error:
        raise BackendUnreachableError(
            f"The backend does not answer ({error}).", next_step="Call check_setup."
        ) from error
    except RuntimeError as error:
        if "poisoned" in str(error) or "closed" in str(error):
            raise ClientLostError(
                f"The training client accepts no more requests: {error}",
                next_step="Call create_training_client with its last checkpoint.",
            ) from error
        raise
    except ValueError as error:  # the SDK's word for an answer it cannot use
        raise RequestFailedError(
            f"The SDK could not use the backend's answer: {_SDK_TAIL.sub('', str(error))}.",
            next_step="Call check_setup: backend and SDK may not be of one version.",
        ) from error


def _failed(reason: str) -> TinkerMcpError:
    if _LOST.search(reason):
        return ClientLostError(
            reason, next_step="Call list_checkpoints, then create_training_client(checkpoint=...)."
        )
    return RequestFailedError(reason, next_step="Correct the request and call again.")


def _refused(error: Exception) -> TinkerMcpError:
    body = getattr(error, "body", None)
    detail = body.get("detail") if isinstance(body, dict) else None
    status = getattr(error, "status_code", None)
    reason = str(detail or error)
    if _LOST.search(reason):
        return _failed(reason)
    if status == _HTTP_NOT_FOUND:
        return NotFoundError(reason, next_step="Call list_checkpoints or list_models.")
    return RequestFailedError(
        f"{reason} (HTTP {status})", next_step="Call check_setup, then correct the request."
    )
