"""From a file or inline conversations to datums under handles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import datasets, datums, rendering
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.datasets import Conversation, Problem
from tinker_mcp.training.datums import DatumSet, Reduction, Rendered
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True)
class BuildPlan:
    """What build_datums asks for; exactly one of `path` and `conversations` is set."""

    path: str | None
    conversations: Sequence[Any] | None
    base_model: str
    renderer: str | None
    train_on_what: str
    max_length: int
    eval_share: float
    seed: int
    reduction: Reduction
    skip_invalid: bool


@dataclass(frozen=True)
class Built:
    """Datums to train on, those kept aside, and the rows that gave none."""

    backend: Backend
    train: DatumSet
    held_out: DatumSet | None
    problems: Sequence[Problem]


async def build(workspace: Workspace, plan: BuildPlan) -> Built | None:
    """Read, check, split and render; None when it takes longer than a call may (ask again).

    Raises:
        InvalidInputError: Not exactly one source, or rows that cannot be used and may not be
            left out. No handle is made then.
        NotFoundError: There is no such file.
    """
    deadline = workspace.deadline()
    rows, problems = await anyio.to_thread.run_sync(_read, plan)  # before a backend is started
    backend, capabilities = await workspace.ask(
        "capabilities", lambda rest: rest.get_server_capabilities()
    )
    plan = _within_context(plan, capabilities)

    async def start() -> Built:
        model = await anyio.to_thread.run_sync(
            rendering.load, backend, plan.base_model, plan.renderer
        )
        sides = await anyio.to_thread.run_sync(_render, rows, model, plan)
        train, *held_out = [_keep(workspace, model, side) for side in sides]
        refused = [problem for side in sides for problem in side.problems]
        return Built(backend, train, held_out[0] if held_out else None, [*problems, *refused])

    return await workspace.unfinished.finish(("build", repr(plan)), start, backend, deadline)


def _within_context(
    plan: BuildPlan, capabilities: tinker.types.GetServerCapabilitiesResponse
) -> BuildPlan:
    """The plan with a max_length that the model can take."""
    limits = {m.model_name: m.max_context_length for m in capabilities.supported_models}
    limit = limits.get(plan.base_model)
    return replace(plan, max_length=min(plan.max_length, limit)) if limit else plan


def _read(plan: BuildPlan) -> tuple[list[Conversation], list[Problem]]:
    if (plan.path is None) == (plan.conversations is None):
        raise InvalidInputError(
            "build_datums needs either path or conversations.", next_step="Give exactly one."
        )
    if plan.path is not None:
        rows, problems = datasets.read_file(plan.path)
    else:
        rows, problems = datasets.read_inline(plan.conversations or ())
    if problems and not (plan.skip_invalid and rows):
        raise datasets.refuse(problems, len(rows) + len(problems))
    return rows, problems


def _render(
    rows: Sequence[Conversation], model: ModelRenderer, plan: BuildPlan
) -> Sequence[Rendered]:
    """The side to train on and, with an eval_share, the one kept aside."""
    sides = [
        datums.render(side, model, plan.train_on_what, plan.max_length, plan.reduction)
        for side in datasets.split(rows, plan.eval_share, plan.seed)
        if side
    ]
    refused = [problem for side in sides for problem in side.problems]
    if refused and not (plan.skip_invalid and all(side.datums for side in sides)):
        raise datasets.refuse(refused, len(rows))
    return sides


def _keep(workspace: Workspace, model: ModelRenderer, rendered: Rendered) -> DatumSet:
    data_id = workspace.next_id("data")
    kept = workspace.data[data_id] = DatumSet(
        data_id=data_id,
        base_model=model.model_name,
        renderer=model.name,
        datums=rendered.datums,
        truncated=rendered.truncated,
        statistics=datums.measure(rendered.datums),
        example=datums.marked(rendered.datums[0], model),
    )
    return kept
