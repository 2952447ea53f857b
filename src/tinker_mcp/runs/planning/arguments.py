"""What may be asked of `start_run`, with its ranges. Settles nothing: that is `plan`'s."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tinker_mcp.runs.distill_options import DistillArguments
from tinker_mcp.runs.rl_options import RlArguments
from tinker_mcp.runs.spec import LoggerName, LrSchedule, Method

Acceptance = Literal["learning_rate", "renderer", "truncation", "no_held_out", "divergence"]
"""A check that the caller wants to let pass."""

TrainOnWhat = Literal[
    "last_assistant_message",
    "last_assistant_turn",
    "all_assistant_messages",
    "all_messages",
    "all_tokens",
]

WEEK_S = 604_800  # how long the cookbook keeps checkpoints by default


class RunArguments(BaseModel):
    """The arguments of a run as they were given; None leaves a choice to `plan`.

    Attributes:
        base_model, checkpoint: Exactly one; a checkpoint brings its model and rank.
        data, eval_data: A path, or a handle of build_datums (`data-N`); for rl a file of prompts,
            or none where there is an environment.
        eval_share: Of `data`, kept aside for evaluation; 0 does without.
        steps, epochs: At most one; one epoch where none is given.
        batch_size: Datums a step, 32 by default; for dpo pairs, 16; for rl groups, 16.
        learning_rate: The highest one; `auto` asks `training.models`.
        rank: Of a new adapter, 32 by default.
        max_length: Tokens of a conversation; as many as the model takes by default.
        train_on_what: Of sft on conversations; all of the assistant's messages by default.
        beta: Of dpo, 0.1 by default.
        rl: The options of rl.
        distill: The options of distill and prompt_distill.
        save_every, eval_every: Steps; 0 saves at the end, evaluates at the start and the end only.
        ttl_s: How long checkpoints before the last are kept; 0 or None for ever.
        max_usd: What it may cost; needed where it can cost money.
        idempotency_key: Two calls with the same one start one run.
        columns: The layout's name of a column to its name in the files.
        accept: Checks that shall not refuse; `divergence` has the run go on when its loss is not
            finite or has tripled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method
    data: str | None = Field(None, min_length=1, max_length=4096)
    base_model: str | None = Field(None, min_length=1, max_length=300)
    checkpoint: str | None = Field(None, min_length=1, max_length=1000)
    eval_data: str | None = Field(None, min_length=1, max_length=4096)
    eval_share: float | None = Field(None, ge=0, lt=1)
    steps: int | None = Field(None, ge=1, le=1_000_000)
    epochs: float | None = Field(None, gt=0, le=10_000)
    batch_size: int | None = Field(None, ge=1, le=100_000)
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    lr_schedule: LrSchedule = "linear"
    rank: int | None = Field(None, ge=1, le=512)
    renderer: str | None = Field(None, min_length=1, max_length=100)
    max_length: int | None = Field(None, ge=2)
    train_on_what: TrainOnWhat | None = None
    beta: float | None = Field(None, gt=0, le=100)
    rl: RlArguments | None = None
    distill: DistillArguments | None = None
    save_every: int | None = Field(None, ge=0)
    eval_every: int | None = Field(None, ge=0)
    ttl_s: int | None = WEEK_S
    seed: int = Field(0, ge=0, lt=2**31)
    name: str | None = Field(None, min_length=1, max_length=100)
    max_usd: float | None = Field(None, gt=0)
    idempotency_key: str | None = Field(None, min_length=1, max_length=200)
    loggers: tuple[LoggerName, ...] = ()
    columns: dict[str, str] = {}
    accept: tuple[Acceptance, ...] = ()
