"""What a run is made of, whatever its method: two sets, and how they were rendered."""

from __future__ import annotations

from dataclasses import dataclass

from tinker_mcp.runs.spec import DataFacts


@dataclass(frozen=True)
class Material:
    """What a spec says of its data.

    Attributes:
        units: What a batch is made of: datums, pairs, or prompts.
    """

    train: DataFacts
    held_out: DataFacts | None
    units: int
    renderer: str
    max_length: int
    train_on_what: str
