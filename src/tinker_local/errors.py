"""The errors of the local backend: each is a problem and a next step.

    LocalError
    ├── UserInputError          a request that can never work as it is
    ├── NotFoundError           a model, a sampler or a checkpoint that is not here
    ├── CancelledError          the client no longer wants the answer
    ├── NotServedError          Tinker has it, this server has not
    ├── ModelSpecError          the value given for a model names nothing
    ├── ModelFolderError        a folder lacks a file, or holds one that cannot be served
    ├── ModelUnavailableError   a model is not in the cache and could not be fetched
    │   └── WrongHashError      what was fetched is not what was published
    └── CacheError              the cache folder cannot be read or written

Knows nothing of HTTP: whoever answers a request maps these to a status.
"""

from __future__ import annotations


class LocalError(Exception):
    """A problem (value, limit, place) together with what to do about it.

    Attributes:
        problem: One or two sentences that say what is wrong.
        next_step: One or two sentences that say what to call or to change.
    """

    def __init__(self, problem: str, next_step: str) -> None:
        super().__init__(problem, next_step)
        self.problem = problem
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.problem} {self.next_step}"


class UserInputError(LocalError):
    """A request that can never work as it is."""


class NotFoundError(LocalError):
    """A model, a sampler or a checkpoint that is not here."""


class CancelledError(LocalError):
    """The client no longer wants the answer."""


class NotServedError(LocalError):
    """Tinker's protocol has it, this server has not."""


class ModelSpecError(LocalError):
    """The value given for a model is neither a known name, nor `org/model`, nor a folder."""


class ModelFolderError(LocalError):
    """A model's folder lacks a file, or holds one that this backend cannot serve."""


class ModelUnavailableError(LocalError):
    """A model is not in the cache and could not be fetched."""


class WrongHashError(ModelUnavailableError):
    """A download's SHA-256 differs from the published one; the file has been deleted."""


class CacheError(LocalError):
    """The cache folder cannot be read or written."""
