"""Where an environment works, and what is asked of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.rendering import ModelRenderer

HELD_OUT_GROUPS = 64
"""Of an evaluation, at most: each is played through, and a game may have many turns."""


@dataclass(frozen=True)
class Place:
    """Where an environment is to work: what it need not be told.

    Attributes:
        batch_size: Groups a step.
    """

    backend: Backend
    renderer: ModelRenderer
    batch_size: int
    group_size: int
    max_tokens: int
    temperature: float
    steps: int
    seed: int

    @property
    def known(self) -> Mapping[str, Any]:
        """By the names that environments have for it."""
        return {
            **dict.fromkeys(("batch_size", "groups_per_batch"), self.batch_size),
            **dict.fromkeys(("group_size", "train_group_size", "num_envs"), self.group_size),
            "test_group_size": 1,
            **dict.fromkeys(("model_name_for_tokenizer", "model_name"), self.renderer.model_name),
            "renderer_name": self.renderer.name,
            "renderer": self.renderer.renderer,
            "tokenizer": self.renderer.tokenizer,
            "base_url": self.backend.base_url,
            "n_batches": self.steps,
            "seed": self.seed,
        }


class Environment(Protocol):
    """Gives each step its groups."""

    def batch(self, step: int) -> Sequence[Any]:
        """EnvGroupBuilders of a step, counted from 1; the same whenever it is asked."""

    def held_out(self) -> Sequence[Any]:
        """Those of an evaluation, at most HELD_OUT_GROUPS; none where it holds nothing out."""


@contextlib.contextmanager
def refused(name: str) -> Iterator[None]:
    """Say that an environment cannot be made, whatever its own code raises in the block."""
    try:
        yield
    except Exception as error:  # whatever foreign code raises
        raise InvalidInputError(
            f"environment={name!r} cannot be made: {type(error).__name__}: {str(error)[:300]}",
            next_step="Check its name and args.",
        ) from error
