"""From a file, inline rows or sampled groups to datums under handles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import datasets, datums, marking, rendering, roots
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.datums import DatumKind, DatumSet, Reduction, Rendered
from tinker_mcp.training.formats import COLUMNS, Columns, Example
from tinker_mcp.training.problems import Problem, refuse
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

_LAST_REPLY = ("last_assistant_message", "last_assistant_turn", "all_assistant_messages")


@dataclass(frozen=True)
class BuildPlan:
    """What build_datums asks for; exactly one of `path` and `conversations` is set."""

    kind: DatumKind
    path: str | None
    conversations: Sequence[Any] | None
    columns: Columns
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
        InvalidInputError: Not exactly one source, arguments that do not fit the kind, a path
            outside the roots, or rows that cannot be used and may not be left out. No handle is
            made then.
        NotFoundError: There is no such file.
    """
    deadline = workspace.deadline()
    _check(plan)

    async def read() -> tuple[list[Example], list[Problem]]:
        return await anyio.to_thread.run_sync(_read, workspace, plan)

    # Before a backend is started, and without one.
    found = await workspace.unfinished.finish(("read", repr(plan)), read, None, deadline)
    if found is None:
        return None
    rows, problems = found
    backend, capabilities = await workspace.ask(
        "capabilities", lambda rest: rest.get_server_capabilities()
    )
    plan = _within_context(plan, capabilities)

    async def start() -> Built:
        model = await anyio.to_thread.run_sync(
            rendering.load, backend, plan.base_model, plan.renderer
        )
        sides = await anyio.to_thread.run_sync(_render, rows, model, plan)
        train, *held_out = [_keep(workspace, model, plan.kind, side) for side in sides]
        refused = [problem for side in sides for problem in side.problems]
        return Built(backend, train, held_out[0] if held_out else None, [*problems, *refused])

    return await workspace.unfinished.finish(("build", repr(plan)), start, backend, deadline)


def check_columns(columns: Columns) -> None:
    """Refuse a mapping to names that no layout has.

    Raises:
        InvalidInputError: There is such a name.
    """
    for name in columns:
        if name not in COLUMNS:
            raise InvalidInputError(
                f"columns maps {name!r}, which no layout has; they have {', '.join(COLUMNS)}.",
                next_step='Write columns as {"prompt": "<your column>", ...}.',
            )


def _check(plan: BuildPlan) -> None:
    if (plan.path is None) == (plan.conversations is None):
        raise InvalidInputError(
            "build_datums needs either path or conversations.", next_step="Give exactly one."
        )
    check_columns(plan.columns)
    if plan.kind == "preference" and plan.reduction != "none":
        raise InvalidInputError(
            "reduction=mean does not go with kind=preference: DPO compares sums of logprobs.",
            next_step="Leave reduction out.",
        )
    if plan.kind == "preference" and plan.train_on_what not in _LAST_REPLY:
        raise InvalidInputError(
            f"train_on_what={plan.train_on_what} does not go with kind=preference, which trains "
            "the last reply.",
            next_step="Leave train_on_what out.",
        )


def _within_context(
    plan: BuildPlan, capabilities: tinker.types.GetServerCapabilitiesResponse
) -> BuildPlan:
    """The plan with a max_length that the model can take."""
    limit = context_length(capabilities, plan.base_model)
    return replace(plan, max_length=min(plan.max_length, limit)) if limit else plan


def context_length(
    capabilities: tinker.types.GetServerCapabilitiesResponse, base_model: str
) -> int | None:
    """Tokens a model can take, where the backend says so."""
    limits = {m.model_name: m.max_context_length for m in capabilities.supported_models}
    return limits.get(base_model)


def _read(workspace: Workspace, plan: BuildPlan) -> tuple[list[Example], list[Problem]]:
    if plan.path is not None:
        rows, problems = read(workspace, plan.path, plan.kind, plan.columns)
    else:
        rows, problems = datasets.read_inline(plan.conversations or (), plan.kind, plan.columns)
    if problems and not (plan.skip_invalid and rows):
        raise _refuse(problems, len(rows) + len(problems))
    return rows, problems


def read(
    workspace: Workspace, path: str, kind: str, columns: Columns
) -> tuple[list[Example], list[Problem]]:
    """What a file that an agent named holds, and the rows that hold none. Blocks.

    Raises:
        InvalidInputError: It lies outside the roots, or is no file that can be read.
        NotFoundError: There is no such file.
    """
    resolved = roots.allowed(path, workspace.connector.settings)
    return datasets.read_file(resolved, path, kind, columns)


def _refuse(problems: Sequence[Problem], total: int) -> InvalidInputError:
    error = refuse(problems, total)
    if any(problem.category != "unknown_format" for problem in problems):
        return error
    return InvalidInputError(
        error.problem,
        next_step="\nCall inspect_dataset on the file: it says which kind and columns to give.",
    )


def _render(rows: Sequence[Example], model: ModelRenderer, plan: BuildPlan) -> Sequence[Rendered]:
    """The side to train on and, with an eval_share, the one kept aside."""
    sides = [
        datums.render(side, model, plan.train_on_what, plan.max_length, plan.reduction)
        for side in datasets.split(rows, plan.eval_share, plan.seed)
        if side
    ]
    refused = [problem for side in sides for problem in side.problems]
    if refused and not (plan.skip_invalid and all(side.datums for side in sides)):
        raise refuse(refused, len(rows))
    return sides


def _keep(
    workspace: Workspace, model: ModelRenderer, kind: DatumKind, rendered: Rendered
) -> DatumSet:
    data_id = workspace.next_id("data")
    kept = workspace.data[data_id] = DatumSet(
        data_id=data_id,
        base_model=model.model_name,
        renderer=model.name,
        datums=rendered.datums,
        truncated=rendered.truncated,
        split_texts=rendered.split_texts,
        statistics=datums.measure(rendered.datums),
        example=marking.marked(rendered.datums[0], model),
        kind=kind,
    )
    return kept
