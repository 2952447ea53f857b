"""Samples kept under a handle, so that their tokens never cross the agent's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tinker


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
    """

    group_id: str
    base_model: str
    renderer: str
    prompt: tinker.ModelInput
    sequences: Sequence[SampledSequence]
    weights: str
