"""One file a method, with the whole loop in its `train`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from tinker_mcp.runs.attempt import Attempt, Outcome
from tinker_mcp.runs.spec import Method, RunSpec


class Training(Protocol):
    """A module of this package."""

    LOSS: str
    """The metric of a step that is the method's loss."""

    def load(self, folder: Path, spec: RunSpec) -> tuple[Sequence[Any], Sequence[Any]]:
        """What an Attempt's `train` and `held_out` are, from the run's folder. Blocks.

        Raises:
            InvalidInputError: A file is gone, or another one than the run was planned with.
        """

    async def train(self, attempt: Attempt) -> Outcome:
        """From the attempt's first step to its end.

        Raises:
            TinkerMcpError: It cannot go on. Another attempt may: it has a client of its own.
        """


def method(name: Method) -> Training:
    """A method by name."""
    return cast("Training", importlib.import_module(f"{__name__}.{name}"))
