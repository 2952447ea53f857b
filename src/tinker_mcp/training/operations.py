"""Single training operations: forward_backward, optim_step, and checkpoints of a client."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tinker_mcp.errors import InvalidInputError, TinkerMcpError
from tinker_mcp.training.clients import OpenClient, Workspace, told_about
from tinker_mcp.training.datums import DatumSet, trained_tokens, weight_sum
from tinker_mcp.training.loop import Report, TrainLoop, TrainPlan

if TYPE_CHECKING:
    import tinker

CheckpointKind = Literal["state", "sampler", "both"]


@dataclass(frozen=True)
class Scored:
    """What a forward pass found; `loss` is in nats per unit of weight."""

    loss: float
    loss_sum: float
    datums: int
    trained_tokens: int
    optim_metrics: dict[str, float] | None


def portion(data: DatumSet, offset: int, limit: int | None) -> Sequence[tinker.Datum]:
    """Datums `offset` to `offset + limit`.

    Raises:
        InvalidInputError: None are there.
    """
    chosen = data.datums[offset : None if limit is None else offset + limit]
    if not chosen:
        raise InvalidInputError(
            f"offset {offset} and limit {limit} leave none of the {len(data.datums)} datums of "
            f"{data.data_id}.",
            next_step=f"Use an offset below {len(data.datums)} and a limit of at least 1.",
        )
    return chosen


async def forward_backward(
    workspace: Workspace,
    client_id: str,
    data: DatumSet,
    datums: Sequence[tinker.Datum],
    loss_fn: str,
    adam: tinker.AdamParams | None,
) -> Scored | None:
    """Accumulate gradients, and step on them if `adam` is given; None when it takes longer.

    Both requests are submitted before either is awaited.
    """
    deadline = workspace.deadline()
    client = await workspace.live_client(client_id)
    check_fits(client, data)

    async def start() -> Scored:
        gradients = client.tinker_client.forward_backward(list(datums), loss_fn)  # type: ignore[arg-type]
        if adam is None:
            return _scored(await gradients, datums, None)
        with client.counting_step():
            stepping = client.tinker_client.optim_step(adam)
            output, stepped = await asyncio.gather(gradients.coroutine(), stepping.coroutine())
        return _scored(output, datums, stepped.metrics or {})

    key = ("forward_backward", *_key(datums), loss_fn, adam and adam.model_dump_json())
    with told_about(client):
        return await client.unfinished.finish(key, start, client.backend, deadline)


async def forward(
    workspace: Workspace,
    client_id: str,
    data: DatumSet,
    datums: Sequence[tinker.Datum],
    loss_fn: str,
) -> Scored | None:
    """Score without gradients; None when it takes longer than a call may."""
    deadline = workspace.deadline()
    client = await workspace.live_client(client_id)
    check_fits(client, data)

    async def start() -> Scored:
        output = await client.tinker_client.forward(list(datums), loss_fn)  # type: ignore[arg-type]
        return _scored(output, datums, None)

    key = ("forward", client_id, client.step, *_key(datums), loss_fn)
    with told_about(client):
        return await workspace.unfinished.finish(key, start, client.backend, deadline)


async def optim_step(
    workspace: Workspace, client_id: str, adam: tinker.AdamParams
) -> dict[str, float] | None:
    """Apply the accumulated gradients; None when it takes longer than a call may."""
    deadline = workspace.deadline()
    client = await workspace.live_client(client_id)

    async def start() -> dict[str, float]:
        with client.counting_step():
            return (await client.tinker_client.optim_step(adam)).metrics or {}

    key = ("optim_step", adam.model_dump_json())
    with told_about(client):
        return await client.unfinished.finish(key, start, client.backend, deadline)


async def train(workspace: Workspace, client_id: str, plan: TrainPlan, report: Report) -> TrainLoop:
    """Begin the loop of this plan, or go on with it, for as long as a call may last."""
    deadline = workspace.deadline()
    data = workspace.datums(plan.data_id)
    if plan.batch_size > len(data.datums):
        raise InvalidInputError(
            f"batch_size {plan.batch_size} is more than the {len(data.datums)} datums of "
            f"{plan.data_id}.",
            next_step=f"Use a batch_size of at most {len(data.datums)}.",
        )
    client = await workspace.live_client(client_id)
    check_fits(client, data)
    loop = client.loops.get(plan.key)
    if loop is None:
        loop = client.loops[plan.key] = TrainLoop(plan, data.datums, client.tinker_client)
        client.unfinished.forget()
    async with loop.turn:  # the same call made twice at once must not take a step twice
        if not loop.is_finished:
            await _advance(client, loop, deadline, report)
    return loop


async def _advance(client: OpenClient, loop: TrainLoop, deadline: float, report: Report) -> None:
    before = loop.submitted
    try:
        with told_about(client):
            await loop.advance(client.backend, deadline, report)
    except TinkerMcpError:
        client.loops.pop(loop.plan.key, None)
        loop.close()
        client.step -= loop.submitted - len(loop.results)
        raise
    finally:
        client.step += loop.submitted - before
    if loop.is_finished:
        client.loops.pop(loop.plan.key, None)


async def save_checkpoint(
    workspace: Workspace, client_id: str, name: str, kind: CheckpointKind, ttl_s: int | None
) -> dict[str, str] | None:
    """Save a client's weights; the paths by kind, or None when it takes longer than a call may."""
    deadline = workspace.deadline()
    client = await workspace.live_client(client_id)

    async def start() -> dict[str, str]:
        saving: dict[str, tinker.APIFuture[Any]] = {}
        # Both are submitted before either is awaited.
        if kind in ("state", "both"):
            saving["state"] = client.tinker_client.save_state(name, ttl_seconds=ttl_s)
        if kind in ("sampler", "both"):
            saving["sampler"] = client.tinker_client.save_weights_for_sampler(
                name, ttl_seconds=ttl_s
            )
        paths = {saved_kind: str((await future).path) for saved_kind, future in saving.items()}
        client.last_checkpoint = paths.get("state", client.last_checkpoint)
        return paths

    key = ("save_checkpoint", name, kind)
    with told_about(client):
        return await client.unfinished.finish(key, start, client.backend, deadline)


def check_fits(client: OpenClient, data: DatumSet) -> None:
    """Refuse datums rendered for another model.

    Raises:
        InvalidInputError: The base models differ.
    """
    if client.base_model != data.base_model:
        raise InvalidInputError(
            f"{data.data_id} was built for {data.base_model}, but {client.client_id} trains "
            f"{client.base_model}.",
            next_step=f'Call build_datums with base_model="{client.base_model}".',
        )


def _key(datums: Sequence[tinker.Datum]) -> tuple[int, int]:
    """Datum sets never change, so the first datum and the count tell a portion from others."""
    return id(datums[0]), len(datums)


def _scored(
    output: tinker.ForwardBackwardOutput,
    datums: Sequence[tinker.Datum],
    optim_metrics: dict[str, float] | None,
) -> Scored:
    loss_sum = output.metrics["loss:sum"]
    weight = weight_sum(datums)
    return Scored(
        loss=loss_sum / weight if weight else math.nan,
        loss_sum=loss_sum,
        datums=len(datums),
        trained_tokens=sum(trained_tokens(datum) for datum in datums),
        optim_metrics=optim_metrics,
    )
