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
    try:
        yield
    except TinkerMcpError:
        raise
    except Exception as error:
        in_our_terms = _translated(error)
        if in_our_terms is None:
            raise
        raise in_our_terms from error


def _translated(error: Exception) -> TinkerMcpError | None:
    """The same in the domain's terms; None for what the SDK would not raise."""
    import tinker  # only here: whoever raised its exception has loaded it

    if isinstance(error, tinker.RequestFailedError):
        return _failed(_SDK_TAIL.sub("", str(error)).removeprefix("Request failed: "))
    if isinstance(error, tinker.APIStatusError):
        return _refused(error)
    if isinstance(error, tinker.APIConnectionError):
        return BackendUnreachableError(
            f"The backend does not answer ({error}).", next_step="Call check_setup."
        )
    if isinstance(error, tinker.TinkerError):  # a key that cannot be one, for example
        return RequestFailedError(_sentence(str(error)), next_step="Call check_setup.")
    return _misused(error)


def _misused(error: Exception) -> TinkerMcpError | None:
    """What the SDK says with Python's own exceptions."""
    if isinstance(error, RuntimeError) and re.search("poisoned|closed", str(error)):
        return ClientLostError(
            f"The training client accepts no more requests: {_sentence(str(error))}",
            next_step="Call create_training_client with its last checkpoint.",
        )
    if isinstance(error, ValueError):  # its word for an answer it cannot use
        return RequestFailedError(
            f"The SDK could not use the backend's answer: {_SDK_TAIL.sub('', str(error))}.",
            next_step="Call check_setup: backend and SDK may not be of one version.",
        )
    return None


def _failed(reason: str) -> TinkerMcpError:
    if _LOST.search(reason):
        return ClientLostError(
            reason, next_step="Call list_checkpoints, then create_training_client(checkpoint=...)."
        )
    return RequestFailedError(_sentence(reason), next_step="Correct the request and call again.")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


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
        f"{reason.rstrip('.')} (HTTP {status}).",
        next_step="Call check_setup, then correct the request.",
    )
