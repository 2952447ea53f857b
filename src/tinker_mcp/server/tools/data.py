"""build_datums."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import anyio.to_thread
from pydantic import BaseModel, Field

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.server.tools.replies import Seed, ToolContext, workspace_of
from tinker_mcp.training import datasets, datums, rendering
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.datasets import Conversation
from tinker_mcp.training.datums import DatumSet
from tinker_mcp.training.rendering import ModelRenderer

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
    data_id: str
    datums: int
    tokens: Tokens
    eval_data_id: str | None
    eval_datums: int
    eval_tokens: Tokens | None
    base_model: str
    renderer: str
    backend: str
    truncated: int = Field(description="Conversations longer than max_length, cut at the end.")
    left_out: list[str] = Field(description="Rows that were skipped, at most ten shown.")
    left_out_count: int
    example: str = Field(description="One datum's text; trained tokens stand between ⟦ and ⟧.")
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
    max_length: Annotated[int, Field(ge=2, description="Tokens a conversation may have.")] = 2048,
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
    workspace = workspace_of(ctx)
    found, problems = await anyio.to_thread.run_sync(_read, path, conversations)
    if problems and not (skip_invalid and found):
        raise datasets.refuse(problems, len(found) + len(problems))
    backend = await workspace.connector.connect()
    model = await anyio.to_thread.run_sync(rendering.load, backend, base_model, renderer)
    train_rows, eval_rows = datasets.split(found, eval_share, seed)

    def build(rows: list[Conversation]) -> datums.Built:
        return datums.build(rows, model, train_on_what, max_length, reduction)

    made = await anyio.to_thread.run_sync(build, train_rows)
    made_eval = await anyio.to_thread.run_sync(build, eval_rows) if eval_rows else None
    sides = [made] if made_eval is None else [made, made_eval]
    refused = [problem for side in sides for problem in side.problems]
    if refused and not (skip_invalid and all(side.datums for side in sides)):
        raise datasets.refuse(refused, len(found))
    problems += refused
    # Kept only now: a refused call leaves no handle behind.
    train = _keep(workspace, model, made)
    held_out = None if made_eval is None else _keep(workspace, model, made_eval)
    return BuiltDatums(
        data_id=train.data_id,
        datums=len(train.datums),
        tokens=_tokens(train),
        eval_data_id=held_out.data_id if held_out else None,
        eval_datums=len(held_out.datums) if held_out else 0,
        eval_tokens=_tokens(held_out) if held_out else None,
        base_model=base_model,
        renderer=model.name,
        backend=backend.label,
        truncated=train.truncated + (held_out.truncated if held_out else 0),
        left_out=[str(problem)[:200] for problem in problems[:10]],
        left_out_count=len(problems),
        example=train.example,
        next_step=f'Call create_training_client(base_model="{base_model}").',
    )


def _read(
    path: str | None, conversations: list[Any] | None
) -> tuple[list[Conversation], list[datasets.Problem]]:
    if (path is None) == (conversations is None):
        raise InvalidInputError(
            "build_datums needs either path or conversations.", next_step="Give exactly one."
        )
    if path is not None:
        return datasets.read_file(path)
    return datasets.read_inline(conversations or [])


def _keep(workspace: Workspace, model: ModelRenderer, made: datums.Built) -> DatumSet:
    data_id = workspace.next_id("data")
    kept = workspace.data[data_id] = DatumSet(
        data_id=data_id,
        base_model=model.model_name,
        renderer=model.name,
        datums=made.datums,
        truncated=made.truncated,
        statistics=datums.measure(made.datums),
        example=datums.marked(made.datums[0], model),
    )
    return kept


def _tokens(data: DatumSet) -> Tokens:
    return Tokens(**vars(data.statistics))
