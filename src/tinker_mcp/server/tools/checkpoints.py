"""save_checkpoint and list_checkpoints."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    ClientId,
    ToolContext,
    workspace_of,
)
from tinker_mcp.training import operations
from tinker_mcp.training.operations import CheckpointKind


class SavedCheckpoint(BaseModel):
    finished: bool
    state: str | None = Field(description="To train on from: weights and optimizer.")
    sampler: str | None = Field(description="To sample from.")
    step: int
    backend: str
    next_step: str


class ListedCheckpoint(BaseModel):
    checkpoint: str
    kind: str
    time: str
    size_bytes: int | None
    expires_at: str | None


class Checkpoints(BaseModel):
    backend: str
    checkpoints: list[ListedCheckpoint] = Field(description="Newest first.")
    total: int
    next_step: str


async def save_checkpoint(
    ctx: ToolContext,
    client_id: ClientId,
    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
            description="Letters, digits, '.', '_' and '-'; unique for this client.",
        ),
    ],
    kind: Annotated[
        CheckpointKind, Field(description="state to train on from, sampler to sample from.")
    ] = "both",
    ttl_s: Annotated[
        int | None, Field(ge=3600, le=315_360_000, description="Seconds until it expires.")
    ] = None,
) -> SavedCheckpoint:
    """Save a training client's current weights so that they outlive it. Stays until deleted.

    Storage costs on the hosted service: set ttl_s. Next: sample(checkpoint=...), or later
    create_training_client(checkpoint=...) with the state.
    """
    workspace = workspace_of(ctx)
    paths = await operations.save_checkpoint(workspace, client_id, name, kind, ttl_s)
    client = workspace.client(client_id)
    saved = paths or {}
    if paths is None:
        next_step = STILL_RUNNING.format(tool="save_checkpoint")
    elif "sampler" in saved:
        next_step = f'Call sample(checkpoint="{saved["sampler"]}", ...).'
    else:
        next_step = f'Later: create_training_client(checkpoint="{saved["state"]}").'
    return SavedCheckpoint(
        finished=paths is not None,
        state=saved.get("state"),
        sampler=saved.get("sampler"),
        step=client.step,
        backend=client.backend.label,
        next_step=next_step,
    )


async def list_checkpoints(
    ctx: ToolContext,
    limit: Annotated[int, Field(ge=1, le=50)] = 20,
    offset: Annotated[int, Field(ge=0)] = 0,
) -> Checkpoints:
    """List saved checkpoints of all training runs, newest first. Changes nothing, costs nothing.

    Next: create_training_client(checkpoint=...) for a state, sample(checkpoint=...) for a sampler.
    """
    backend, found = await workspace_of(ctx).ask(
        f"list_checkpoints {limit} {offset}",
        lambda rest: rest.list_user_checkpoints(limit=limit, offset=offset),
    )
    listed = [
        ListedCheckpoint(
            checkpoint=c.tinker_path,
            kind="state" if c.checkpoint_type == "training" else c.checkpoint_type,
            time=c.time.isoformat(timespec="seconds"),
            size_bytes=c.size_bytes,
            expires_at=c.expires_at.isoformat(timespec="seconds") if c.expires_at else None,
        )
        for c in found.checkpoints
    ]
    total = found.cursor.total_count if found.cursor else len(listed)
    return Checkpoints(
        backend=backend.label,
        checkpoints=listed,
        total=total,
        next_step="Call create_training_client(checkpoint=...) or sample(checkpoint=...)."
        if listed
        else "None yet: call save_checkpoint after training.",
    )
