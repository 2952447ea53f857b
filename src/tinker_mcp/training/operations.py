"""Training operations on a client: forward_backward, forward, optim_step and train."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinker_mcp.errors import InvalidInputError, TinkerMcpError
from tinker_mcp.training import dpo, losses
from tinker_mcp.training.clients import OpenClient, Workspace, told_about
from tinker_mcp.training.datums import DatumSet, trained_tokens
from tinker_mcp.training.loop import Report, TrainLoop, TrainPlan
from tinker_mcp.training.losses import LossConfig
from tinker_mcp.training.objectives import BackendLoss, Objective
from tinker_mcp.training.order import Work, submitted_in_turn

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True)
class Scored:
    """What a forward pass found; `loss` in nats, per unit of weight or, for dpo, per pair."""

    loss: float
    loss_sum: float
    datums: int
    trained_tokens: int
    metrics: dict[str, float]
    optim_metrics: dict[str, float] | None


def portion(data: DatumSet, offset: int, limit: int | None) -> Sequence[tinker.Datum]:
    """Datums `offset` to `offset + limit`.

    Raises:
        InvalidInputError: None are there, or a pair would be torn apart.
    """
    if data.kind == "preference" and (offset % dpo.PAIR or (limit or 0) % dpo.PAIR):
        raise InvalidInputError(
            f"offset {offset} and limit {limit} would tear apart a pair of {data.data_id}: chosen, "
            "rejected, chosen, rejected ...",
            next_step="Use an even offset and an even limit.",
        )
    chosen = data.datums[offset : None if limit is None else offset + limit]
    if not chosen:
        raise InvalidInputError(
            f"offset {offset} and limit {limit} leave none of the {len(data.datums)} datums of "
            f"{data.data_id}.",
            next_step=f"Use an offset below {len(data.datums)} and a limit of at least 1.",
        )
    return chosen


@dataclass(frozen=True)
class Training:
    """How far a train call came; `loop` None while it is being prepared."""

    loop: TrainLoop | None
    was_finished: bool


async def forward_backward(
    workspace: Workspace,
    client_id: str,
    data: DatumSet,
    datums: Sequence[tinker.Datum],
    loss_fn: str,
    config: LossConfig | None,
    adam: tinker.AdamParams | None,
) -> Scored | None:
    """Accumulate gradients, and step on them if `adam` is given; None when it takes longer.

    Both requests are submitted before either is awaited.
    """

    def work(client: OpenClient, objective: Objective, complete: LossConfig) -> Work[Scored]:
        async def start() -> Scored:
            gradients = objective.forward_backward(client.tinker_client, datums)
            if adam is None:
                with client.counting_gradient():
                    return _scored(objective, await gradients, datums, None)
            with client.counting_step():
                stepping = client.tinker_client.optim_step(adam)
                output, stepped = await asyncio.gather(gradients, stepping.coroutine())
            return _scored(objective, output, datums, stepped.metrics or {})

        key = ("forward_backward", *_key(datums), loss_fn, *sorted(complete.items()))
        return Work(client.unfinished, (*key, adam and adam.model_dump_json()), start)

    return await _with_objective(workspace, client_id, data, datums, loss_fn, config, work)


async def forward(
    workspace: Workspace,
    client_id: str,
    data: DatumSet,
    datums: Sequence[tinker.Datum],
    loss_fn: str,
    config: LossConfig | None,
) -> Scored | None:
    """Score without gradients; None when it takes longer than a call may."""

    def work(client: OpenClient, objective: Objective, complete: LossConfig) -> Work[Scored]:
        async def start() -> Scored:
            output = await objective.forward(client.tinker_client, datums)
            return _scored(objective, output, datums, None)

        key = ("forward", client_id, client.step, *_key(datums), loss_fn)
        return Work(workspace.unfinished, (*key, *sorted(complete.items())), start)

    return await _with_objective(workspace, client_id, data, datums, loss_fn, config, work)


async def _with_objective(
    workspace: Workspace,
    client_id: str,
    data: DatumSet,
    datums: Sequence[tinker.Datum],
    loss_fn: str,
    config: LossConfig | None,
    work: Callable[[OpenClient, Objective, LossConfig], Work[Scored]],
) -> Scored | None:
    """Check what is asked and do `work` in turn, with the loss and its complete config."""
    deadline = workspace.deadline()
    complete = checked(workspace, client_id, data, datums, loss_fn, config)

    async def prepare(client: OpenClient) -> Work[Scored] | None:
        objective = await objective_of(workspace, client, data, loss_fn, complete, deadline)
        return None if objective is None else work(client, objective, complete)

    return await submitted_in_turn(workspace, client_id, deadline, prepare)


async def optim_step(
    workspace: Workspace, client_id: str, adam: tinker.AdamParams
) -> dict[str, float] | None:
    """Apply the accumulated gradients; None when it takes longer than a call may."""

    async def prepare(client: OpenClient) -> Work[dict[str, float]]:
        async def start() -> dict[str, float]:
            with client.counting_step():
                return (await client.tinker_client.optim_step(adam)).metrics or {}

        return Work(client.unfinished, ("optim_step", adam.model_dump_json()), start)

    return await submitted_in_turn(workspace, client_id, workspace.deadline(), prepare)


async def train(workspace: Workspace, client_id: str, plan: TrainPlan, report: Report) -> Training:
    """Begin the loop of this plan, or go on with it, for as long as a call may last.

    A plan that is finished stays so: the same call made again finds its results and trains nothing.
    """
    deadline = workspace.deadline()
    data = workspace.datums(plan.data_id)
    _check_batch(plan, data)
    complete = checked(
        workspace, client_id, data, data.datums, plan.loss_fn, dict(plan.loss_config)
    )

    async def prepare(client: OpenClient) -> Work[TrainLoop] | None:
        objective = await objective_of(workspace, client, data, plan.loss_fn, complete, deadline)
        if objective is None:
            return None

        async def start() -> TrainLoop:
            if plan.key not in client.loops:
                loop = TrainLoop(plan, data.datums, client.tinker_client, objective)
                loop.begin()
                client.step += loop.submitted
                client.pending_gradients = 0
                client.loops[plan.key] = loop
            return client.loops[plan.key]

        return Work(client.unfinished, ("train", *plan.key), start)

    client = workspace.client(client_id)
    loop = client.loops.get(plan.key)
    if loop is not None and loop.is_finished:
        return Training(loop, was_finished=True)
    if loop is None:
        loop = await submitted_in_turn(workspace, client_id, deadline, prepare)
    else:
        await workspace.live_client(client_id)
    if loop is None:
        return Training(None, was_finished=False)
    async with loop.turn:  # the same call made twice at once must not take a step twice
        if not loop.is_finished:
            await _advance(client, loop, deadline, report)
    return Training(loop, was_finished=False)


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


def _check_batch(plan: TrainPlan, data: DatumSet) -> None:
    count = len(data.datums)
    if plan.batch_size > count:
        raise InvalidInputError(
            f"batch_size {plan.batch_size} is more than the {count} datums of {plan.data_id}.",
            next_step=f"Use a batch_size of at most {count}.",
        )
    if data.kind == "preference" and plan.batch_size % dpo.PAIR:
        raise InvalidInputError(
            f"batch_size {plan.batch_size} is odd, but {plan.data_id} holds pairs: chosen, "
            "rejected, chosen, rejected ...",
            next_step="batch_size counts datums: use an even one.",
        )


def checked(
    workspace: Workspace,
    client_id: str,
    data: DatumSet,
    datums: Sequence[tinker.Datum],
    loss_fn: str,
    config: LossConfig | None,
) -> LossConfig:
    """The complete config of a loss that fits client and datums.

    Raises:
        NotFoundError: No such client.
        InvalidInputError: Client, datums, loss and config do not fit together.
    """
    client = workspace.client(client_id)
    check_fits(client, data)
    return losses.check(loss_fn, config, data, datums, client.backend.kind == "local")


async def objective_of(
    workspace: Workspace,
    client: OpenClient,
    data: DatumSet,
    loss_fn: str,
    config: LossConfig,
    deadline: float,
) -> Objective | None:
    """The loss, ready to use; None when what it needs takes longer than a call may."""
    if loss_fn != "dpo":
        return BackendLoss(loss_fn, config)
    return await workspace.unfinished.finish(
        ("references", client.client_id, data.data_id, config["beta"]),
        lambda: dpo.prepare(workspace, client, data, config["beta"]),
        client.backend,
        deadline,
    )


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
    objective: Objective,
    output: tinker.ForwardBackwardOutput,
    datums: Sequence[tinker.Datum],
    optim_metrics: dict[str, float] | None,
) -> Scored:
    return Scored(
        loss=objective.loss(output, datums),
        loss_sum=output.metrics["loss:sum"],
        datums=len(datums),
        trained_tokens=sum(trained_tokens(datum) for datum in datums),
        metrics=objective.metrics(output),
        optim_metrics=optim_metrics,
    )
