"""What can go wrong, each with the next step an agent can take.

```
TinkerMcpError            code + problem + next_step
  InvalidInputError       invalid_input        a value given is unusable
  NotFoundError           not_found            a handle or checkpoint does not exist
  ClientLostError         client_lost          a training client went with its backend
  BackendStartingError    backend_starting     the local backend is on its way; call again
  BackendUnreachableError backend_unreachable  no answer from the backend
    BackendGoneError      backend_unreachable  nothing listens there any more
  RequestFailedError      request_failed       the backend refused or failed a request
  StoreBusyError          store_busy           another process holds the database of runs
```
"""

from __future__ import annotations


class TinkerMcpError(Exception):
    """A problem (value, limit, place) and a next step (a call the agent can make)."""

    code = "error"

    def __init__(self, problem: str, *, next_step: str) -> None:
        super().__init__(f"{problem} {next_step}")
        self.problem = problem
        self.next_step = next_step


class InvalidInputError(TinkerMcpError):
    """A value that was given cannot be used."""

    code = "invalid_input"


class NotFoundError(TinkerMcpError):
    """A handle, checkpoint or file does not exist."""

    code = "not_found"


class ClientLostError(TinkerMcpError):
    """A training client is gone because its backend or session is."""

    code = "client_lost"


class BackendStartingError(TinkerMcpError):
    """The local backend is being prepared; nothing was done yet, and nothing is lost."""

    code = "backend_starting"


class BackendUnreachableError(TinkerMcpError):
    """The backend gives no answer."""

    code = "backend_unreachable"


class BackendGoneError(BackendUnreachableError):
    """Nothing listens at the backend's address: it has ended, or the network is down."""


class RequestFailedError(TinkerMcpError):
    """The backend refused a request or failed on it."""

    code = "request_failed"


class StoreBusyError(TinkerMcpError):
    """Another process holds the database of runs for longer than a write takes."""

    code = "store_busy"
