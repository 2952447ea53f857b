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
# What the SDK puts around the backend's sentence (lib/api_future_impl.py, _base_client.py).
_SDK_HEAD = re.compile(
    r"^(Request failed|Error retrieving result|Proto deserialization failed): |^Error code: \d+ - "
)
_SDK_TAIL = re.compile(
    r"( with status \d+| \(status \d+\))?( for| of| \()\s*self\.(request_id|model_cls)=.*$",
    re.DOTALL,
)
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
        return _failed(_own_words(str(error)))
    if isinstance(error, tinker.APIStatusError):
        return _refused(error)
    if isinstance(error, tinker.APIConnectionError):
        return BackendUnreachableError(
            f"The backend does not answer ({_own_words(str(error)).rstrip('.')}).",
            next_step="Call check_setup.",
        )
    if isinstance(error, tinker.TinkerError):  # a key that cannot be one, for example
        return RequestFailedError(_sentence(str(error)), next_step="Call check_setup.")
    if isinstance(error, ValueError) and isinstance(error.__cause__, tinker.APIError):
        return _translated(error.__cause__)  # the answer itself, which the SDK wrapped once more
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
            f"The SDK could not use the backend's answer: {_sentence(_own_words(str(error)))}",
            next_step="Call check_setup: backend and SDK may not be of one version.",
        )
    return None


def _failed(reason: str) -> TinkerMcpError:
    if _LOST.search(reason):
        return ClientLostError(
            reason, next_step="Call list_checkpoints, then create_training_client(checkpoint=...)."
        )
    return RequestFailedError(_sentence(reason), next_step="Correct the request and call again.")


def _own_words(text: str) -> str:
    """The backend's sentence alone, without what the SDK says around it."""
    return _SDK_HEAD.sub("", _SDK_TAIL.sub("", text)).strip()


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _refused(error: Exception) -> TinkerMcpError:
    status = getattr(error, "status_code", None)
    reason = _detail(getattr(error, "body", None)) or "The backend refused the request"
    if _LOST.search(reason):
        return _failed(reason)
    if status == _HTTP_NOT_FOUND:
        return NotFoundError(reason, next_step="Call list_checkpoints or list_models.")
    return RequestFailedError(
        f"{reason.rstrip('.')} (HTTP {status}).",
        next_step="Call check_setup, then correct the request.",
    )


def _detail(body: object) -> str | None:
    """The sentence in an error's body: text, or FastAPI's list of places and problems."""
    said = body
    if isinstance(body, dict):
        said = body.get("detail") or body.get("message") or body.get("error")
    if isinstance(said, list):
        said = "; ".join(_place_and_problem(item) for item in said)
    if isinstance(said, dict):
        said = said.get("message")
    if not isinstance(said, str) or said.lstrip().startswith("<"):  # a gateway's page
        return None
    return said.strip() or None


def _place_and_problem(item: object) -> str:
    if not isinstance(item, dict):
        return str(item)
    place = ".".join(str(part) for part in item.get("loc", ()))
    return f"{place}: {item.get('msg', item)}" if place else str(item.get("msg", item))
