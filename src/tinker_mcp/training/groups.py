"""Samples kept under a handle, so that their tokens never cross the agent's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tinker

MAX_GROUPS = 256
MAX_TOKENS = 1_000_000  # 60 MB, since Python's numbers are objects


@dataclass(frozen=True)
class SampledSequence:
    """What was drawn after the prompt: M token ids, and log q of each in nats where told."""

    tokens: Sequence[int]
    logprobs: Sequence[float] | None


@dataclass(frozen=True)
class Group:
    """Several samples of one prompt.

    Attributes:
        renderer: Of the messages, or of the model where plain text was continued.
        weights: A phrase that says whose weights drew them.
        temperature: Their logprobs are those of the distribution at this temperature.
    """

    group_id: str
    base_model: str
    renderer: str
    prompt: tinker.ModelInput
    sequences: Sequence[SampledSequence]
    weights: str
    temperature: float = 1.0

    @property
    def tokens(self) -> int:
        """Of the prompt and all samples."""
        return self.prompt.length + sum(len(sequence.tokens) for sequence in self.sequences)


def keep(groups: dict[str, Group], group: Group) -> None:
    """Add a group; the oldest go where there are more than MAX_GROUPS, or MAX_TOKENS in all."""
    groups[group.group_id] = group
    while len(groups) > 1 and (
        len(groups) > MAX_GROUPS or sum(kept.tokens for kept in groups.values()) > MAX_TOKENS
    ):
        del groups[next(iter(groups))]
