"""create_training_client, forward_backward, optim_step and train."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    CheckpointPath,
    ClientId,
    DataId,
    LearningRate,
    Seed,
    ToolContext,
    backend_label,
    finite,
    rounded,
    workspace_of,
)
from tinker_mcp.training import models, operations
from tinker_mcp.training.clients import NewClient, OpenClient
from tinker_mcp.training.loop import StepResult, TrainLoop, TrainPlan

if TYPE_CHECKING:
    import tinker

LossName = Literal["cross_entropy"]
_POINTS_SHOWN = 40


class AdamStep(BaseModel):
    """Adam's settings for one step, by the SDK's names and with its defaults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-12, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip_norm: float = Field(0.0, ge=0, description="0 clips nothing.")


class CreatedClient(BaseModel):
    finished: bool
    client_id: str | None = None
    base_model: str | None
    rank: int | None = None
    checkpoint: str | None
    backend: str | None = None
    learning_rate_advice: float | None = None
    learning_rate_source: str | None = None
    next_step: str


class Gradients(BaseModel):
    finished: bool
    loss: float | None = Field(description="Nats a trained token (a unit of weight).")
    is_finite: bool | None
    loss_sum: float | None = Field(description="What the backend sums: `loss:sum`.")
    datums: int
    trained_tokens: int | None
    step: int = Field(description="optim_steps sent for this client in this server.")
    grad_norm: float | None
    backend: str
    next_step: str


class Stepped(BaseModel):
    finished: bool
    step: int
    grad_norm: float | None
    backend: str
    next_step: str


class LossPoint(BaseModel):
    step: int
    loss: float


class Trained(BaseModel):
    finished: bool
    steps_done: int
    steps: int
    first_loss: float | None
    last_loss: float | None
    lowest_loss: float | None
    is_finite: bool
    nan_at_step: int | None
    losses: list[LossPoint] = Field(description="Nats a trained token; at most 40 points.")
    client_step: int
    backend: str
    next_step: str


async def create_training_client(
    ctx: ToolContext,
    base_model: Annotated[
        str | None, Field(description="Start a new adapter on this model.")
    ] = None,
    checkpoint: Annotated[
        CheckpointPath | None,
        Field(description="Or go on from a saved state, tinker://.../weights/..."),
    ] = None,
    rank: Annotated[int, Field(ge=1, le=512, description="LoRA rank.")] = 32,
    seed: Annotated[Seed | None, Field(description="Makes the initial adapter repeatable.")] = None,
    train_mlp: bool = True,
    train_attn: bool = True,
    train_unembed: bool = True,
    load_optimizer: Annotated[
        bool, Field(description="With checkpoint: also restore Adam's moments.")
    ] = True,
) -> CreatedClient:
    """Open a LoRA training client, new or from a checkpoint, and get its handle.

    Costs nothing by itself. rank, seed and train_* apply to a new adapter only; a checkpoint brings
    its own. Next: forward_backward on held-out data for the loss before training, then train.
    """
    if (base_model is None) == (checkpoint is None):
        raise InvalidInputError(
            "create_training_client needs either base_model or checkpoint.",
            next_step="Give exactly one: base_model to start, checkpoint to go on.",
        )
    if base_model is not None and not (train_mlp or train_attn or train_unembed):
        raise InvalidInputError(
            "train_mlp, train_attn and train_unembed are all false: nothing would be trained.",
            next_step="Set at least one of them to true.",
        )
    new = NewClient(
        base_model, checkpoint, rank, seed, train_mlp, train_attn, train_unembed, load_optimizer
    )
    client = await workspace_of(ctx).create(new)
    if client is None:
        return CreatedClient(
            finished=False,
            base_model=base_model,
            checkpoint=checkpoint,
            backend=backend_label(ctx),
            next_step=STILL_RUNNING.format(tool="create_training_client"),
        )
    advice = await anyio.to_thread.run_sync(models.learning_rate, client.base_model)
    return CreatedClient(
        finished=True,
        client_id=client.client_id,
        base_model=client.base_model,
        rank=client.rank,
        checkpoint=checkpoint,
        backend=client.backend.label,
        learning_rate_advice=rounded(float(advice.value)),
        learning_rate_source=advice.source,
        next_step=f'Call forward_backward(client_id="{client.client_id}", data_id=<held-out>, '
        "forward_only=true) for the loss before, then train.",
    )


async def forward_backward(
    ctx: ToolContext,
    client_id: ClientId,
    data_id: DataId,
    loss_fn: LossName = "cross_entropy",
    optim: Annotated[
        AdamStep | None, Field(description="Also take this Adam step; sent together, not after.")
    ] = None,
    forward_only: Annotated[
        bool, Field(description="Only compute the loss, for example on held-out data.")
    ] = False,
    offset: Annotated[int, Field(ge=0, description="First datum to use.")] = 0,
    limit: Annotated[int | None, Field(ge=1, description="How many; default all.")] = None,
) -> Gradients:
    """Compute the loss on datums and accumulate its gradient; with optim, step on it as well.

    Changes the client unless forward_only. Spends training tokens on the hosted service. For many
    steps use train, which overlaps them. Next: optim_step if you gave no optim.
    """
    workspace = workspace_of(ctx)
    data = workspace.datums(data_id)
    datums = operations.portion(data, offset, limit)
    if forward_only:
        if optim is not None:
            raise InvalidInputError(
                "forward_only computes no gradient for optim to step on.",
                next_step="Leave one of the two out.",
            )
        scored = await operations.forward(workspace, client_id, data, datums, loss_fn)
    else:
        scored = await operations.forward_backward(
            workspace, client_id, data, datums, loss_fn, _adam(optim) if optim else None
        )
    client = workspace.client(client_id)
    if scored is None:
        next_step = STILL_RUNNING.format(tool="forward_backward")
    elif not math.isfinite(scored.loss):
        next_step = "The weights have diverged: go on from a checkpoint, with a tenth of the rate."
    elif forward_only:
        next_step = f'Call train(client_id="{client_id}", ...), then this again to compare.'
    elif optim is None:
        next_step = f'Call optim_step(client_id="{client_id}", learning_rate=...).'
    else:
        next_step = f'Call it again, or sample(client_id="{client_id}", messages=...).'
    return Gradients(
        finished=scored is not None,
        loss=finite(scored.loss) if scored else None,
        is_finite=math.isfinite(scored.loss) if scored else None,
        loss_sum=finite(scored.loss_sum) if scored else None,
        datums=len(datums),
        trained_tokens=scored.trained_tokens if scored else None,
        step=client.step,
        grad_norm=_grad_norm(scored.optim_metrics) if scored else None,
        backend=client.backend.label,
        next_step=next_step,
    )


async def optim_step(
    ctx: ToolContext,
    client_id: ClientId,
    learning_rate: LearningRate,
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95,
    eps: Annotated[float, Field(gt=0)] = 1e-12,
    weight_decay: Annotated[float, Field(ge=0)] = 0.0,
    grad_clip_norm: Annotated[float, Field(ge=0, description="0 clips nothing.")] = 0.0,
) -> Stepped:
    """Apply the accumulated gradients with Adam. Changes the client; call forward_backward first.

    Prefer forward_backward with optim, or train: they send both requests at once. Next: sample, or
    forward_backward again.
    """
    workspace = workspace_of(ctx)
    adam = AdamStep(
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_clip_norm=grad_clip_norm,
    )
    metrics = await operations.optim_step(workspace, client_id, _adam(adam))
    client = workspace.client(client_id)
    is_done = metrics is not None
    return Stepped(
        finished=is_done,
        step=client.step,
        grad_norm=_grad_norm(metrics),
        backend=client.backend.label,
        next_step=f'Call sample(client_id="{client_id}", ...) or forward_backward again.'
        if is_done
        else STILL_RUNNING.format(tool="optim_step"),
    )


async def train(
    ctx: ToolContext,
    client_id: ClientId,
    data_id: DataId,
    steps: Annotated[int, Field(ge=1, description="Optimizer steps in all.")],
    batch_size: Annotated[int, Field(ge=1, description="Datums a step.")],
    learning_rate: LearningRate,
    loss_fn: LossName = "cross_entropy",
    seed: Annotated[Seed, Field(description="Chooses the order of the data.")] = 0,
    weight_decay: Annotated[float, Field(ge=0)] = 0.0,
    grad_clip_norm: Annotated[float, Field(ge=0, description="0 clips nothing.")] = 0.0,
) -> Trained:
    """Take many steps, each a forward_backward and an optim_step, with the requests overlapped.

    Changes the client; spends training tokens on the hosted service. Answers after at most 45 s: as
    long as finished is false, call again with exactly the same arguments and it goes on where it
    was. The data is shuffled anew each epoch. Next: forward_backward(forward_only=true) on held-out
    data, sample, save_checkpoint.
    """
    workspace = workspace_of(ctx)
    adam = AdamStep(
        learning_rate=learning_rate, weight_decay=weight_decay, grad_clip_norm=grad_clip_norm
    )
    plan = TrainPlan(data_id, steps, batch_size, _adam(adam), loss_fn, seed)

    async def report(result: StepResult) -> None:
        message = f"step {result.step} of {steps}: loss {result.loss:.4f}"
        await ctx.report_progress(result.step, steps, message)

    loop = await operations.train(workspace, client_id, plan, report)
    return _trained(workspace.client(client_id), loop)


def _trained(client: OpenClient, loop: TrainLoop) -> Trained:
    results = loop.results
    finite = [r for r in results if math.isfinite(r.loss)]
    broken = next((r.step for r in results if not math.isfinite(r.loss)), None)
    if not loop.is_finished:
        next_step = STILL_RUNNING.format(tool="train")
    elif broken is not None:
        next_step = (
            "The loss is not finite: start again from a checkpoint, with a tenth of the rate."
        )
    else:
        next_step = (
            f'Call forward_backward(client_id="{client.client_id}", data_id=<held-out>, '
            f'forward_only=true), sample(client_id="{client.client_id}", ...), save_checkpoint.'
        )
    return Trained(
        finished=loop.is_finished,
        steps_done=len(results),
        steps=loop.plan.steps,
        first_loss=rounded(finite[0].loss) if finite else None,
        last_loss=rounded(finite[-1].loss) if finite else None,
        lowest_loss=rounded(min(r.loss for r in finite)) if finite else None,
        is_finite=broken is None,
        nan_at_step=broken,
        losses=_thinned(finite),
        client_step=client.step,
        backend=client.backend.label,
        next_step=next_step,
    )


def _thinned(results: list[StepResult]) -> list[LossPoint]:
    """Evenly spaced points, first and last among them."""
    count = min(len(results), _POINTS_SHOWN)
    chosen = (
        [results[round(i * (len(results) - 1) / (count - 1))] for i in range(count)]
        if count > 1
        else results
    )
    return [LossPoint(step=r.step, loss=rounded(r.loss)) for r in chosen]


def _adam(step: AdamStep) -> tinker.AdamParams:
    import tinker

    return tinker.AdamParams(**step.model_dump())


def _grad_norm(metrics: dict[str, float] | None) -> float | None:
    norm = (metrics or {}).get("grad_norm")
    return None if norm is None else finite(norm)
