"""save_checkpoint, list_checkpoints, manage_checkpoint and export_weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    CheckpointPath,
    ClientId,
    ToolContext,
    backend_label,
    finite,
    workspace_of,
)
from tinker_mcp.training import checkpoints, exports
from tinker_mcp.training.checkpoints import (
    MAX_TTL_S,
    MIN_TTL_S,
    Action,
    ListedKind,
    Managed,
    SavedKind,
)
from tinker_mcp.training.exports import ExportFormat

if TYPE_CHECKING:
    from tinker.types import Checkpoint

Ttl = Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S)]

_SHOWN_CHARACTERS = 11_000  # of all rows together: a reply stays under 4k tokens


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
    is_public: bool


class Checkpoints(BaseModel):
    backend: str
    checkpoints: list[ListedCheckpoint] = Field(description="Newest first.")
    total: int = Field(description="Of every kind.")
    next_offset: int | None
    next_step: str


class ManagedCheckpoint(BaseModel):
    checkpoint: str
    exists: bool
    is_public: bool
    expires_at: str | None
    backend: str
    next_step: str


class ExportedWeights(BaseModel):
    finished: bool
    folder: str
    files: list[str]
    size_bytes: int | None
    base_model: str | None
    max_difference: float | None = Field(
        description="Nats, at the worst token, from the checkpoint's; bfloat16 makes up to 1."
    )
    backend: str | None
    next_step: str


async def save_checkpoint(
    ctx: ToolContext,
    client_id: ClientId,
    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
            description="Unique for this client.",
        ),
    ],
    kind: Annotated[SavedKind, Field(description="To train on from, to sample from.")] = "both",
    ttl_s: Ttl | None = None,
) -> SavedCheckpoint:
    """Save a training client's current weights. Hosted storage costs money: set ttl_s.

    Next: sample(checkpoint=...) with the sampler; later create_training_client with the state.
    """
    workspace = workspace_of(ctx)
    saved = await checkpoints.save(workspace, client_id, name, kind, ttl_s)
    client = workspace.client(client_id)
    if saved is None:
        next_step = STILL_RUNNING.format(tool="save_checkpoint")
    elif saved.sampler is not None:
        next_step = f'Call sample(checkpoint="{saved.sampler}", ...).'
    else:
        next_step = f'Later: create_training_client(checkpoint="{saved.state}").'
    return SavedCheckpoint(
        finished=saved is not None,
        state=saved and saved.state,
        sampler=saved and saved.sampler,
        step=client.step if saved is None else saved.step,
        backend=client.backend.label,
        next_step=next_step,
    )


async def list_checkpoints(
    ctx: ToolContext,
    client_id: str | None = None,
    run_id: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9._:-]+$", description="tinker://<this>/..."),
    ] = None,
    kind: ListedKind | None = None,
    limit: Annotated[int, Field(ge=1, le=50)] = 20,
    offset: Annotated[int, Field(ge=0)] = 0,
) -> Checkpoints:
    """List saved checkpoints, newest first, of all runs or of one. Free.

    Next: create_training_client with a state, sample with a sampler.
    """
    workspace = workspace_of(ctx)
    if client_id is not None:
        if run_id is not None:
            raise InvalidInputError(
                "list_checkpoints got client_id and run_id.", next_step="Give one of them."
            )
        run_id = str(workspace.client(client_id).tinker_client.model_id)
    page = await checkpoints.page(workspace, run_id, kind, limit, offset)
    listed = [_listed(checkpoint) for checkpoint in page.checkpoints]
    shown = _that_fit(listed)
    is_whole = len(shown) == len(listed)
    next_offset = page.next_offset if is_whole else page.positions[len(shown)]
    if next_offset is not None:
        next_step = f"There are more: call again with offset={next_offset}."
    elif listed:
        next_step = "Call create_training_client(checkpoint=...) or sample(checkpoint=...)."
    else:
        next_step = "None here: call save_checkpoint after training."
    return Checkpoints(
        backend=page.backend,
        checkpoints=shown,
        total=page.total,
        next_offset=next_offset,
        next_step=next_step,
    )


async def manage_checkpoint(
    ctx: ToolContext,
    checkpoint: CheckpointPath,
    action: Action,
    ttl_s: Annotated[Ttl | None, Field(description="For set_ttl; none: for ever.")] = None,
) -> ManagedCheckpoint:
    """Publish, unpublish or delete a checkpoint, or set when it expires.

    delete is for ever, publish is for everyone: ask the user first.
    """
    managed = await checkpoints.manage(workspace_of(ctx), checkpoint, action, ttl_s)
    now = managed.now
    return ManagedCheckpoint(
        checkpoint=checkpoint,
        exists=now is not None,
        is_public=now is not None and now.public,
        expires_at=_expiry(now) if now else None,
        backend=managed.backend,
        next_step=_after(managed, action),
    )


async def export_weights(
    ctx: ToolContext,
    checkpoint: CheckpointPath,
    output_dir: Annotated[str, Field(min_length=1, description="A new or empty folder.")],
    format: Annotated[
        ExportFormat,
        Field(description="For PEFT, or a whole model."),
    ] = "adapter",
) -> ExportedWeights:
    """Write a checkpoint's weights into a local folder, and check them by loading them.

    Takes a state, or a sampler that was saved together with one. Opens a temporary training run.
    """
    exported = await exports.export(workspace_of(ctx), checkpoint, output_dir, format)
    if exported is None:
        return ExportedWeights(
            finished=False,
            folder=output_dir,
            files=[],
            size_bytes=None,
            base_model=None,
            max_difference=None,
            backend=backend_label(ctx),
            next_step=STILL_RUNNING.format(tool="export_weights"),
        )
    loader = "PeftModel.from_pretrained" if format == "adapter" else "AutoModelForCausalLM"
    return ExportedWeights(
        finished=True,
        folder=exported.folder,
        files=exported.files,
        size_bytes=exported.size_bytes,
        base_model=exported.base_model,
        max_difference=finite(exported.max_difference, 3),
        backend=exported.backend,
        next_step=f"{exported.remark}Load it with {loader}, or serve it with vLLM.",
    )


def _listed(checkpoint: Checkpoint) -> ListedCheckpoint:
    return ListedCheckpoint(
        checkpoint=checkpoint.tinker_path,
        kind=checkpoints.kind_of(checkpoint),
        time=checkpoint.time.isoformat(timespec="seconds"),
        size_bytes=checkpoint.size_bytes,
        expires_at=_expiry(checkpoint),
        is_public=checkpoint.public,
    )


def _expiry(checkpoint: Checkpoint) -> str | None:
    return checkpoint.expires_at.isoformat(timespec="seconds") if checkpoint.expires_at else None


def _that_fit(listed: list[ListedCheckpoint]) -> list[ListedCheckpoint]:
    """As many of the first as a reply has room for."""
    room = _SHOWN_CHARACTERS
    for position, row in enumerate(listed):
        room -= len(row.model_dump_json())
        if room < 0:
            return listed[:position]
    return listed


def _after(managed: Managed, action: Action) -> str:
    said = "" if managed.is_changed else "It was so already. "
    for client_id in managed.left_without:
        said += (
            f"{client_id} had no later state and can no longer be recreated if it is lost: "
            f'call save_checkpoint(client_id="{client_id}", name=...). '
        )
    if action == "publish":
        return f"{said}Anyone can use it by its path; unpublish takes that back."
    return f"{said}Call list_checkpoints to see what there is."
