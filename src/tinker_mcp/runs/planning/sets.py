"""The two sets of a run, what it is trained and what it is evaluated on, with all their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.runs.planning import checks, sources
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.checks import Base
from tinker_mcp.runs.planning.findings import Findings
from tinker_mcp.runs.planning.sources import Rows
from tinker_mcp.training import datasets
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.datums import DatumSet
from tinker_mcp.training.rendering import ModelRenderer

LONGEST = 32_768  # tokens of a row where the backend does not say what its model takes

_TRAINED = {"text": "all_tokens", "preference": "last_assistant_message"}


@dataclass(frozen=True)
class Sets:
    """What is trained and evaluated on, of one renderer; rows of files end at `max_length`."""

    train: Rows
    held_out: Rows | None
    renderer: str
    max_length: int


def check(workspace: Workspace, arguments: RunArguments, findings: Findings) -> None:
    """Whether the data could be used, where there is no model to render it for. Blocks."""
    handles = _handles(workspace, arguments, findings)
    for argument, data in _given(arguments).items():
        if argument not in handles:
            sources.check_file(workspace, argument, data, arguments, findings)


def build(
    workspace: Workspace,
    arguments: RunArguments,
    backend: Backend,
    base: Base,
    findings: Findings,
) -> Sets | None:
    """Both sets; None where one cannot be used, which `findings` says. Blocks."""
    handles = _handles(workspace, arguments, findings)
    rendered = next((data.renderer for data in handles.values() if data), None)
    name = arguments.renderer or rendered
    model = checks.renderer(backend, base.model_name, name, findings)
    if model is None:
        check(workspace, arguments, findings)
        return None
    limit = base.limit or LONGEST
    max_length = min(arguments.max_length or limit, limit)
    found: dict[str, Rows | None] = {}
    for argument, data in _given(arguments).items():
        if argument in handles:
            found[argument] = _of_handle(argument, handles[argument], base, model, findings)
        else:
            found[argument] = sources.render_file(
                workspace, argument, data, arguments, model, max_length, findings
            )
        if (rows := found[argument]) is not None:
            checks.truncation(argument, rows, max_length, base.limit, findings)
    train, held_out = _sides(arguments, found, findings)
    if train is None:
        return None
    if held_out is not None:
        checks.overlap(train, held_out, findings)
    return Sets(train, held_out, model.name, max_length)


def _given(arguments: RunArguments) -> dict[str, str]:
    given = {"data": arguments.data, "eval_data": arguments.eval_data}
    return {argument: data for argument, data in given.items() if data is not None}


def _handles(
    workspace: Workspace, arguments: RunArguments, findings: Findings
) -> dict[str, DatumSet | None]:
    """The arguments that name a handle, with its datums, None where these cannot be used."""
    return {
        argument: sources.handle(workspace, argument, data, arguments.method, findings)
        for argument, data in _given(arguments).items()
        if sources.is_handle(data)
    }


def _of_handle(
    argument: str, data: DatumSet | None, base: Base, model: ModelRenderer, findings: Findings
) -> Rows | None:
    if data is None:
        return None
    if data.base_model != base.model_name:
        findings.refuse(
            f"{argument}={data.data_id} was built for {data.base_model}, not for {base.model_name}",
            f'Call build_datums with base_model="{base.model_name}", or train {data.base_model}.',
        )
        return None
    if data.renderer != model.name:
        findings.refuse(
            f"{argument}={data.data_id} was rendered by {data.renderer}, not by {model.name}",
            f'Leave renderer out, or call build_datums with renderer="{model.name}".',
        )
        return None
    rows = Rows(
        source=data.data_id,
        kind=data.kind,
        train_on_what=_TRAINED.get(data.kind, f"as in {data.data_id}"),
        datums=data.datums,
        truncated=data.truncated,
    )
    checks.fits_context(argument, rows, base.limit, findings)
    return rows


def _sides(
    arguments: RunArguments, found: Mapping[str, Rows | None], findings: Findings
) -> tuple[Rows | None, Rows | None]:
    """The set to train on and the held-out one; the first is None where one cannot be used."""
    train, held_out = found.get("data"), found.get("eval_data")
    if train is None or None in found.values():
        return None, None
    if held_out is not None or not arguments.eval_share:
        return train, held_out
    try:
        sides = datasets.split(train.units, arguments.eval_share, arguments.seed)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return None, None
    first, second = ([datum for unit in side for datum in unit] for side in sides)
    return replace(train, datums=first), replace(train, datums=second, truncated=0)
