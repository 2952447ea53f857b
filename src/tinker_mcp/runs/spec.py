"""What a run does, complete and checked: a RunSpec never changes, and is all that its worker reads.

Made by `plan`, kept as JSON. Whatever was left open in the call ("auto") is settled here, with its
source, so that a resumed run does what the first one would have done.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tinker_mcp.runs.distill_options import DistillOptions
from tinker_mcp.runs.rl_options import RlOptions

Method = Literal["sft", "dpo", "rl", "distill", "prompt_distill"]
DATUM_METHODS: tuple[Method, ...] = ("sft", "dpo")
"""What is learned is in the data; elsewhere the data is only asked."""

LrSchedule = Literal["constant", "linear", "cosine"]
LoggerName = Literal["wandb", "trackio", "tensorboard"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataFacts(_Frozen):
    """One rendered set, as it lies in the run's folder.

    Attributes:
        source: The path or handle it was made from.
        sha256: Of the file that holds its datums.
        datums: How many; a preference pair is two.
        tokens: Positions of all datums, which is what is billed.
        trained_tokens: Targets with weight above 0.
    """

    source: str
    sha256: str
    datums: int = Field(ge=1)
    tokens: int
    trained_tokens: int
    truncated: int = 0


class RunSpec(_Frozen):
    """A run.

    Attributes:
        checkpoint: A state whose weights it starts from; None starts from `base_model` itself.
        batch_size: Datums a step; for dpo, pairs.
        learning_rate: The highest one; `lr_schedule` brings it down from step to step.
        learning_rate_source: Who says so.
        beta: Of dpo.
        save_every: Steps between two checkpoints; 0 saves only at the end.
        eval_every: Steps between two evaluations; 0 evaluates at the start and the end.
        ttl_s: How long intermediate checkpoints are kept; the final one stays.
        max_usd: What it may cost; None where it costs nothing.
        usd_per_million: The price of a million trained tokens, None where it costs nothing.
    """

    method: Method
    name: str
    backend: Literal["local", "hosted"]
    base_model: str
    checkpoint: str | None
    renderer: str
    train_on_what: str
    max_length: int = Field(ge=2)
    train: DataFacts
    held_out: DataFacts | None
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    learning_rate_source: str
    lr_schedule: LrSchedule
    rank: int = Field(ge=1)
    seed: int = Field(ge=0)
    beta: float | None = None
    rl: RlOptions | None = None
    distill: DistillOptions | None = None
    save_every: int = Field(ge=0)
    eval_every: int = Field(ge=0)
    ttl_s: int | None
    max_usd: float | None = None
    usd_per_million: float | None = None
    stops_on_divergence: bool = True
    loggers: tuple[LoggerName, ...] = ()
