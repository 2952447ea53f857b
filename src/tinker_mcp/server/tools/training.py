"""create_training_client, forward_backward, optim_step and train."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.server.schemas import briefly
from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    CheckpointPath,
    ClientId,
    DataId,
    GradClipNorm,
    LearningRate,
    Number,
    Seed,
    ToolContext,
    WeightDecay,
    Whole,
    backend_label,
    finite,
    rounded,
    workspace_of,
)
from tinker_mcp.training import models, operations
from tinker_mcp.training.clients import OpenClient
from tinker_mcp.training.loop import StepResult, TrainPlan
from tinker_mcp.training.losses import LossName
from tinker_mcp.training.operations import Training
from tinker_mcp.training.sessions import NewClient

if TYPE_CHECKING:
    import tinker

LossFnConfig = Annotated[
    dict[str, Number] | None,
    Field(description="E.g. clip_low_threshold; dpo: beta."),
]
_POINTS_SHOWN = 40


Beta = Annotated[Number, Field(ge=0, lt=1)]
Epsilon = Annotated[Number, Field(gt=0, le=1)]


class AdamStep(BaseModel):
    """Adam's settings for one step, by the SDK's names and with its defaults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    learning_rate: LearningRate
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Epsilon = 1e-12
    weight_decay: WeightDecay = 0.0
    grad_clip_norm: GradClipNorm = 0.0


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
    loss: float | None = Field(description="Nats a trained token; dpo: a pair.")
    is_finite: bool | None
    loss_sum: float | None = Field(description="The backend's `loss:sum`.")
    metrics: dict[str, float | None]
    datums: int
    trained_tokens: int | None
    step: int = Field(description="optim_steps of this client so far.")
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
    losses: list[LossPoint]
    last_metrics: dict[str, float | None]
    client_step: int
    backend: str
    next_step: str


async def create_training_client(
    ctx: ToolContext,
    base_model: Annotated[str | None, Field(description="For a new adapter.")] = None,
    checkpoint: Annotated[
        CheckpointPath | None,
        Field(description="Or a saved state."),
    ] = None,
    rank: Annotated[Whole, Field(ge=1, le=512)] = 32,
    seed: Seed | None = None,
    train_mlp: bool = True,
    train_attn: bool = True,
    train_unembed: bool = True,
    load_optimizer: Annotated[bool, Field(description="Adam's moments too.")] = True,
) -> CreatedClient:
    """Open a LoRA training client, new or from a checkpoint. Free.

    rank, seed and train_* are a new adapter's; a checkpoint brings its own. Next: the loss on
    held-out data (forward_backward, forward_only), then train.
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
    loss_fn_config: LossFnConfig = None,
    optim: Annotated[
        AdamStep | None,
        Field(
            description="Then step: optim_step's arguments.",
            json_schema_extra=briefly("learning_rate"),
        ),
    ] = None,
    forward_only: Annotated[bool, Field(description="Only the loss.")] = False,
    offset: Annotated[Whole, Field(ge=0)] = 0,
    limit: Annotated[Whole | None, Field(ge=1)] = None,
) -> Gradients:
    """Compute a loss on datums and accumulate its gradient; with optim, step on it too.

    Spends training tokens; for many steps use train. cross_entropy takes supervised and text
    datums, dpo preference, the others policy_gradient.
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
        scored = await operations.forward(
            workspace, client_id, data, datums, loss_fn, loss_fn_config
        )
    else:
        adam = _adam(optim) if optim else None
        scored = await operations.forward_backward(
            workspace, client_id, data, datums, loss_fn, loss_fn_config, adam
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
        metrics=_metrics(scored.metrics) if scored else {},
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
    beta1: Beta = 0.9,
    beta2: Beta = 0.95,
    eps: Epsilon = 1e-12,
    weight_decay: WeightDecay = 0.0,
    grad_clip_norm: GradClipNorm = 0.0,
) -> Stepped:
    """Apply the accumulated gradients with Adam; call forward_backward first.

    Faster: forward_backward with optim, or train.
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
    steps: Annotated[Whole, Field(ge=1, le=1_000_000)],
    batch_size: Annotated[Whole, Field(ge=1, description="Datums a step; dpo: even.")],
    learning_rate: LearningRate,
    loss_fn: LossName = "cross_entropy",
    loss_fn_config: LossFnConfig = None,
    seed: Annotated[Seed, Field(description="Of the data's order.")] = 0,
    weight_decay: WeightDecay = 0.0,
    grad_clip_norm: GradClipNorm = 0.0,
) -> Trained:
    """Take many steps of forward_backward and optim_step, overlapped. Spends training tokens.

    While finished is false, call again with the same arguments. Once finished, that only returns
    the result: to train on, give another seed.
    """
    workspace = workspace_of(ctx)
    adam = AdamStep(
        learning_rate=learning_rate, weight_decay=weight_decay, grad_clip_norm=grad_clip_norm
    )
    config = tuple(sorted((loss_fn_config or {}).items()))
    plan = TrainPlan(data_id, steps, batch_size, _adam(adam), loss_fn, seed, config)

    async def report(result: StepResult) -> None:
        message = f"step {result.step} of {steps}: loss {result.loss:.4f}"
        await ctx.report_progress(result.step, steps, message)

    training = await operations.train(workspace, client_id, plan, report)
    return _trained(workspace.client(client_id), plan, training)


def _trained(client: OpenClient, plan: TrainPlan, training: Training) -> Trained:
    results = training.loop.results if training.loop else []
    finite = [r for r in results if math.isfinite(r.loss)]
    broken = next((r.step for r in results if not math.isfinite(r.loss)), None)
    is_finished = training.loop is not None and training.loop.is_finished
    if not is_finished:
        next_step = STILL_RUNNING.format(tool="train")
    elif broken is not None:
        next_step = (
            "The loss is not finite: start again from a checkpoint, with a tenth of the rate."
        )
    elif training.was_finished:
        next_step = (
            "This plan was finished before; this call trained nothing. To train on, call train "
            f"with another seed, such as {plan.seed + 1}."
        )
    else:
        next_step = (
            f'Call forward_backward(client_id="{client.client_id}", data_id=<held-out>, '
            f'forward_only=true), sample(client_id="{client.client_id}", ...), save_checkpoint.'
        )
    return Trained(
        finished=is_finished,
        steps_done=len(results),
        steps=plan.steps,
        first_loss=rounded(finite[0].loss) if finite else None,
        last_loss=rounded(finite[-1].loss) if finite else None,
        lowest_loss=rounded(min(r.loss for r in finite)) if finite else None,
        is_finite=broken is None,
        nan_at_step=broken,
        losses=_thinned(finite),
        last_metrics=_metrics(results[-1].metrics) if results else {},
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


def _metrics(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in metrics.items()}
