"""build_datums."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    Seed,
    ToolContext,
    backend_label,
    workspace_of,
)
from tinker_mcp.training import building
from tinker_mcp.training.building import BuildPlan
from tinker_mcp.training.datums import DatumSet

TrainOnWhat = Literal[
    "last_assistant_message",
    "last_assistant_turn",
    "all_assistant_messages",
    "all_messages",
    "all_tokens",
]


class Tokens(BaseModel):
    total: int
    trained: int = Field(description="Target tokens that count in the loss.")
    shortest: int
    median: int
    longest: int


class BuiltDatums(BaseModel):
    finished: bool
    data_id: str | None = None
    datums: int = 0
    tokens: Tokens | None = None
    eval_data_id: str | None = None
    eval_datums: int = 0
    eval_tokens: Tokens | None = None
    base_model: str
    renderer: str | None = None
    backend: str | None = None
    truncated: int = Field(
        default=0, description="Conversations longer than max_length, cut at the end."
    )
    left_out: list[str] = Field(default=[], description="Rows skipped, at most ten shown.")
    left_out_count: int = 0
    example: str | None = Field(
        default=None, description="One datum's text; trained tokens stand between ⟦ and ⟧."
    )
    next_step: str


async def build_datums(
    ctx: ToolContext,
    base_model: Annotated[str, Field(description="The model to train; see list_models.")],
    path: Annotated[
        str | None,
        Field(description='JSONL file, one {"messages": [{"role", "content"}, ...]} a line.'),
    ] = None,
    conversations: Annotated[
        list[Any] | None,
        Field(description="Instead of path: a list of such objects, or of lists of messages."),
    ] = None,
    renderer: Annotated[
        str | None, Field(description="Default: the one list_models recommends.")
    ] = None,
    train_on_what: Annotated[
        TrainOnWhat, Field(description="Whose tokens count in the loss.")
    ] = "all_assistant_messages",
    max_length: Annotated[
        int, Field(ge=2, description="Tokens a conversation may have; at most the model's context.")
    ] = 2048,
    eval_share: Annotated[
        float, Field(ge=0, lt=1, description="Share kept aside under an eval_data_id, e.g. 0.1.")
    ] = 0.0,
    seed: Annotated[Seed, Field(description="Chooses which conversations are kept aside.")] = 0,
    reduction: Annotated[
        Literal["none", "mean"],
        Field(description="mean: each conversation's weights sum to 1, so all count alike."),
    ] = "none",
    skip_invalid: Annotated[
        bool, Field(description="Leave unusable rows out instead of refusing them.")
    ] = False,
) -> BuiltDatums:
    """Turn conversations into training datums, kept in this server under a handle. Free.

    Reads a JSONL file or inline conversations, renders them with the model's chat format and marks
    which tokens are trained: look at `example` before you train. Set eval_share to keep some aside,
    so that you can show whether the model got better. Next: create_training_client.
    """
    plan = BuildPlan(
        path,
        conversations,
        base_model,
        renderer,
        train_on_what,
        max_length,
        eval_share,
        seed,
        reduction,
        skip_invalid,
    )
    built = await building.build(workspace_of(ctx), plan)
    if built is None:
        next_step = STILL_RUNNING.format(tool="build_datums")
        return BuiltDatums(
            finished=False,
            base_model=base_model,
            backend=backend_label(ctx),
            next_step=next_step,
        )
    train, held_out = built.train, built.held_out
    return BuiltDatums(
        finished=True,
        data_id=train.data_id,
        datums=len(train.datums),
        tokens=_tokens(train),
        eval_data_id=held_out.data_id if held_out else None,
        eval_datums=len(held_out.datums) if held_out else 0,
        eval_tokens=_tokens(held_out) if held_out else None,
        base_model=base_model,
        renderer=train.renderer,
        backend=built.backend.label,
        truncated=train.truncated + (held_out.truncated if held_out else 0),
        left_out=[str(problem)[:200] for problem in built.problems[:10]],
        left_out_count=len(built.problems),
        example=train.example,
        next_step=f'Look at example, then call create_training_client(base_model="{base_model}").',
    )


def _tokens(data: DatumSet) -> Tokens:
    return Tokens(**vars(data.statistics))
