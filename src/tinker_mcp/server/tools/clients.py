"""list_clients and close_client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Literal, TypeAlias

from pydantic import BaseModel, Field

from tinker_mcp.errors import BackendUnreachableError
from tinker_mcp.server.tools.replies import ClientId, ToolContext, workspace_of
from tinker_mcp.training import recovery
from tinker_mcp.training.clients import OpenClient, Workspace

ClientState: TypeAlias = Literal["ready", "recreated_at_next_use", "lost", "silent"]

_SHOWN_HANDLES = 40


class ListedClient(BaseModel):
    client_id: str
    state: ClientState
    base_model: str
    rank: int
    step: int
    last_checkpoint: str | None = Field(description="The state it would be recreated from.")
    saved_at_step: int | None
    unsaved: str | None
    train_calls: int = Field(description="Unfinished.")
    backend: str


class Clients(BaseModel):
    clients: list[ListedClient]
    data: list[str]
    groups: list[str]
    next_step: str


class ClosedClient(BaseModel):
    client_id: str
    step: int
    lost: str | None = Field(description="Work that no checkpoint holds.")
    last_checkpoint: str | None
    backend: str
    next_step: str


async def list_clients(ctx: ToolContext) -> Clients:
    """List this server's open training clients, data and groups. Changes nothing."""
    workspace = workspace_of(ctx)
    open_clients = list(workspace.clients.values())
    listed = await asyncio.gather(*(_listed(workspace, client) for client in open_clients))
    return Clients(
        clients=listed,
        data=_handles(
            f"{data.data_id}: {len(data.datums)} {data.kind} datums for {data.base_model}"
            for data in workspace.data.values()
        ),
        groups=_handles(workspace.groups),
        next_step=_next(listed),
    )


async def close_client(ctx: ToolContext, client_id: ClientId) -> ClosedClient:
    """Free a training client; steps after its last checkpoint are lost.

    Call save_checkpoint first to keep them.
    """
    client = await workspace_of(ctx).close_client(client_id)
    lost = recovery.unsaved(client)
    if client.last_checkpoint is not None:
        next_step = f'To go on: create_training_client(checkpoint="{client.last_checkpoint}").'
    else:
        next_step = "To start again: create_training_client."
    return ClosedClient(
        client_id=client_id,
        step=client.step,
        lost=lost,
        last_checkpoint=client.last_checkpoint,
        backend=client.backend.label,
        next_step=f"Its {lost} are gone. {next_step}" if lost else next_step,
    )


async def _listed(workspace: Workspace, client: OpenClient) -> ListedClient:
    return ListedClient(
        client_id=client.client_id,
        state=await _state(workspace, client),
        base_model=client.base_model,
        rank=client.rank,
        step=client.step,
        last_checkpoint=client.last_checkpoint,
        saved_at_step=client.saved_at_step,
        unsaved=recovery.unsaved(client),
        train_calls=sum(not loop.is_finished for loop in client.loops.values()),
        backend=client.backend.label,
    )


async def _state(workspace: Workspace, client: OpenClient) -> ClientState:
    try:
        why = await workspace.loss(client)
    except BackendUnreachableError:
        return "silent"
    if why is None:
        return "ready"
    return "lost" if recovery.recipe(client) is None else "recreated_at_next_use"


def _handles(all_of_them: Iterable[str]) -> list[str]:
    """The newest of them; a reply stays short."""
    handles = list(all_of_them)
    return handles[-_SHOWN_HANDLES:]


def _next(listed: list[ListedClient]) -> str:
    if not listed:
        return "None is open: call create_training_client."
    lost = next((client for client in listed if client.state == "lost"), None)
    if lost is not None:
        return f'Call close_client(client_id="{lost.client_id}"): it is lost. Then create another.'
    unsaved = next((client for client in listed if client.unsaved), None)
    if unsaved is not None:
        return f'To keep {unsaved.unsaved}: save_checkpoint(client_id="{unsaved.client_id}", ...).'
    return "Go on with train, sample or close_client."
