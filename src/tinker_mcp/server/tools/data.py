"""build_datums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    Seed,
    ToolContext,
    backend_label,
    workspace_of,
)
from tinker_mcp.training import building
from tinker_mcp.training.building import BuildPlan, Built
from tinker_mcp.training.datums import DatumKind, DatumSet

TrainOnWhat = Literal[
    "last_assistant_message",
    "last_assistant_turn",
    "all_assistant_messages",
    "all_messages",
    "all_tokens",
]


Advantages = Literal["centered", "normalized", "raw"]
Columns = Annotated[
    dict[str, str],
    Field(description='{"prompt": "question"}: where names differ.'),
]


class RewardedGroup(BaseModel):
    model_config = ConfigDict(extra="forbid")

    group_id: str
    rewards: list[float] = Field(description="One a sample.")


class Tokens(BaseModel):
    total: int
    trained: int
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
    base_model: str | None
    renderer: str | None = None
    backend: str | None = None
    truncated: int = Field(default=0, description="Rows cut at max_length.")
    split_texts: int = Field(default=0, description="Over max_length: several datums each.")
    left_out: list[str] = Field(default=[], description="At most ten.")
    left_out_count: int = 0
    constant_groups: int = Field(default=0, description="All rewards equal: no gradient.")
    example: str | None = Field(default=None, description="Trained tokens between ⟦ and ⟧.")
    next_step: str


async def build_datums(
    ctx: ToolContext,
    base_model: Annotated[str | None, Field(description="Needed except for groups.")] = None,
    path: Annotated[str | None, Field(description="JSONL, JSON, CSV or Parquet.")] = None,
    conversations: Annotated[list[Any] | None, Field(description="Or the rows.")] = None,
    groups: Annotated[list[RewardedGroup] | None, Field(description="Or sampled.")] = None,
    kind: Annotated[DatumKind, Field(description="text: no chat format.")] = "supervised",
    columns: Columns | None = None,
    advantages: Advantages = "centered",
    renderer: str | None = None,
    train_on_what: TrainOnWhat = "all_assistant_messages",
    max_length: Annotated[int, Field(ge=2, description="Longer rows are cut.")] = 2048,
    eval_share: Annotated[float, Field(ge=0, lt=1, description="Held out, e.g. 0.1.")] = 0.0,
    seed: Seed = 0,
    reduction: Annotated[
        Literal["none", "mean"], Field(description="mean: a row's weights sum to 1.")
    ] = "none",
    skip_invalid: bool = False,
) -> BuiltDatums:
    """Turn a dataset, or sampled groups and your rewards, into training datums. Free.

    Look at `example`. Next: create_training_client.
    """
    if kind == "policy_gradient" or groups is not None:
        _check_groups(kind, path, conversations, groups)
        return await _policy_gradient(ctx, groups or [], advantages)
    if base_model is None:
        raise InvalidInputError(
            f"kind={kind} needs base_model.", next_step="Call list_models to choose one."
        )
    plan = BuildPlan(
        kind,
        path,
        conversations,
        columns or {},
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
        return _unfinished(ctx, base_model)
    return _reply(built)


def _check_groups(kind: str, path: Any, conversations: Any, groups: Any) -> None:
    if kind != "policy_gradient":
        raise InvalidInputError(
            f"groups do not go with kind={kind}.", next_step='Use kind="policy_gradient".'
        )
    if not groups or path is not None or conversations is not None:
        raise InvalidInputError(
            "kind=policy_gradient is built from groups alone.",
            next_step='Call sample with num_samples, then build_datums(kind="policy_gradient", '
            'groups=[{"group_id": ..., "rewards": [...]}]).',
        )


async def _policy_gradient(
    ctx: ToolContext, groups: list[RewardedGroup], advantages: Advantages
) -> BuiltDatums:
    from tinker_mcp.training import policy_gradient
    from tinker_mcp.training.policy_gradient import GroupRewards

    rewarded = [GroupRewards(group.group_id, tuple(group.rewards)) for group in groups]
    built = await policy_gradient.build(workspace_of(ctx), rewarded, advantages)
    data = built.data
    return BuiltDatums(
        finished=True,
        data_id=data.data_id,
        datums=len(data.datums),
        tokens=_tokens(data),
        base_model=data.base_model,
        renderer=data.renderer,
        backend=built.backend.label,
        constant_groups=built.constant_groups,
        example=data.example,
        next_step=_heated(built.heated_groups)
        + f'Call forward_backward(client_id, data_id="{data.data_id}", '
        'loss_fn="importance_sampling" or "ppo") on the client that drew the samples.',
    )


def _heated(groups: Sequence[str]) -> str:
    if not groups:
        return ""
    return (
        f"Warning: {', '.join(groups[:5])} was sampled at a temperature other than 1, so its "
        "logprobs are not the model's own and the losses compare it wrongly: sample at 1. "
    )


def _unfinished(ctx: ToolContext, base_model: str) -> BuiltDatums:
    return BuiltDatums(
        finished=False,
        base_model=base_model,
        backend=backend_label(ctx),
        next_step=STILL_RUNNING.format(tool="build_datums"),
    )


def _reply(built: Built) -> BuiltDatums:
    train, held_out = built.train, built.held_out
    return BuiltDatums(
        finished=True,
        data_id=train.data_id,
        datums=len(train.datums),
        tokens=_tokens(train),
        eval_data_id=held_out.data_id if held_out else None,
        eval_datums=len(held_out.datums) if held_out else 0,
        eval_tokens=_tokens(held_out) if held_out else None,
        base_model=train.base_model,
        renderer=train.renderer,
        backend=built.backend.label,
        truncated=train.truncated + (held_out.truncated if held_out else 0),
        split_texts=train.split_texts + (held_out.split_texts if held_out else 0),
        left_out=[str(problem)[:200] for problem in built.problems[:10]],
        left_out_count=len(built.problems),
        example=train.example,
        next_step=_NEXT[train.kind].format(
            model=train.base_model,
            data=train.data_id,
            held_out=f'eval_data="{held_out.data_id}"' if held_out else "eval_share=0.1",
        ),
    )


_OPEN = 'Look at example, then call create_training_client(base_model="{model}")'
_RUN = ', data="{data}", base_model="{model}", {held_out}).'
_NEXT: dict[DatumKind, str] = {
    "supervised": f'{_OPEN} or start_run(method="sft"{_RUN}',
    "text": f'{_OPEN} or start_run(method="sft"{_RUN}',
    "preference": f'{_OPEN}, then forward_backward(data_id="{{data}}", loss_fn="dpo"); or '
    f'start_run(method="dpo"{_RUN}',
}


def _tokens(data: DatumSet) -> Tokens:
    return Tokens(**vars(data.statistics))
