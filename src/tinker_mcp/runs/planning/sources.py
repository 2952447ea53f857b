"""What a run is trained and evaluated on: a file, rendered here, or datums under a handle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_mcp import garbage
from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.findings import Findings
from tinker_mcp.runs.spec import Method
from tinker_mcp.training import datasets, datums, roots
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.datums import DatumKind, DatumSet
from tinker_mcp.training.formats import Example
from tinker_mcp.training.problems import Problem
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

KINDS: dict[Method, tuple[DatumKind, ...]] = {
    "sft": ("supervised", "text"),
    "dpo": ("preference",),
}
_SHOWN_ROWS = 5


@dataclass(frozen=True)
class Rows:
    """Datums of one source.

    Attributes:
        source: The file's path, or the handle.
        truncated: Rows that lost their end, `lost_tokens` together.
    """

    source: str
    kind: DatumKind
    train_on_what: str
    datums: Sequence[tinker.Datum]
    truncated: int = 0
    lost_tokens: int = 0

    @property
    def datums_a_unit(self) -> int:
        """How many datums in a row belong together."""
        return 2 if self.kind == "preference" else 1

    @cached_property
    def units(self) -> Sequence[Sequence[tinker.Datum]]:
        """What a batch is made of: a datum, or a pair."""
        size = self.datums_a_unit
        with garbage.while_building():
            return [self.datums[i : i + size] for i in range(0, len(self.datums), size)]


def is_handle(data: str) -> bool:
    """Whether it names datums of build_datums; a file of such a name is `./data-1`."""
    return re.fullmatch(r"data-\d+", data) is not None


def handle(
    workspace: Workspace, argument: str, data: str, method: Method, findings: Findings
) -> DatumSet | None:
    """The datums under a handle, if they fit the method."""
    try:
        found = workspace.datums(data)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return None
    if found.kind in KINDS[method]:
        return found
    fitting = KINDS[method][0]
    others = [name for name, kinds in KINDS.items() if found.kind in kinds]
    findings.refuse(
        f"{argument}={data} holds {found.kind} datums, but {method} takes "
        f"{' and '.join(KINDS[method])}",
        f'Call build_datums(kind="{fitting}", ...) and give its data_id'
        + (f', or use method="{others[0]}".' if others else "."),
    )
    return None


def check_file(
    workspace: Workspace, argument: str, data: str, arguments: RunArguments, findings: Findings
) -> None:
    """Whether a file holds rows for the method, where there is no model to render them. Blocks."""
    try:
        path = roots.allowed(data, workspace.connector.settings)
        _, rows, problems = _read(
            path, data, KINDS[arguments.method], tuple(arguments.columns.items())
        )
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return
    _refuse_rows(argument, data, len(rows) + len(problems), problems, findings)


def render_file(
    workspace: Workspace,
    argument: str,
    data: str,
    arguments: RunArguments,
    model: ModelRenderer,
    max_length: int,
    findings: Findings,
) -> Rows | None:
    """The datums of a file; what was rendered last is remembered until the file changes. Blocks."""
    try:
        path = roots.allowed(data, workspace.connector.settings)
        status = path.stat() if path.is_file() else None
        request = _Request(
            path=path,
            version=(status.st_mtime_ns, status.st_size, status.st_ino) if status else (),
            kinds=KINDS[arguments.method],
            columns=tuple(arguments.columns.items()),
            model_name=model.model_name,
            renderer=model.name,
            train_on_what=arguments.train_on_what or "all_assistant_messages",
            max_length=max_length,
            given=data,
            model=model,
        )
        made = _rendered(request)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return None
    _refuse_rows(argument, data, made.total, made.problems, findings)
    return None if made.problems else made.rows


@dataclass(frozen=True)
class _Request:
    path: Path
    version: tuple[int, ...]
    kinds: tuple[DatumKind, ...]
    columns: tuple[tuple[str, str], ...]
    model_name: str
    renderer: str
    train_on_what: str
    max_length: int
    given: str = field(compare=False)
    model: ModelRenderer = field(compare=False)


@dataclass(frozen=True)
class _Made:
    rows: Rows
    total: int
    problems: Sequence[Problem]


@lru_cache(maxsize=4)  # estimate_cost, then start_run: each a training and a held-out file
def _rendered(request: _Request) -> _Made:
    with garbage.while_building():
        kind, examples, problems = _read(
            request.path, request.given, request.kinds, request.columns
        )
        made = datums.render(
            examples, request.model, request.train_on_what, request.max_length, "none"
        )
    what = {"text": "all_tokens", "preference": "last_assistant_message"}
    rows = Rows(
        source=str(request.path),
        kind=kind,
        train_on_what=what.get(kind, request.train_on_what),
        datums=made.datums,
        truncated=made.truncated,
        lost_tokens=made.lost_tokens,
    )
    return _Made(rows, len(examples) + len(problems), [*problems, *made.problems])


def _read(
    path: Path, given: str, kinds: Sequence[DatumKind], columns: tuple[tuple[str, str], ...]
) -> tuple[DatumKind, list[Example], list[Problem]]:
    """The rows as the first of `kinds` that any of them fits; a mapped column decides first."""
    in_order = sorted(kinds, key=lambda kind: kind not in dict(columns))
    tried = []
    for kind in in_order:
        examples, problems = datasets.read_file(path, given, kind, dict(columns))
        is_fit = bool(examples) or any(p.category != "unknown_format" for p in problems)
        if is_fit:
            return kind, examples, problems
        tried.append((kind, examples, problems))
    return tried[0]


def _refuse_rows(
    argument: str, data: str, total: int, problems: Sequence[Problem], findings: Findings
) -> None:
    if not problems:
        return
    shown = "".join(f"\n   - {str(problem)[:200]}" for problem in problems[:_SHOWN_ROWS])
    more = len(problems) - _SHOWN_ROWS
    is_unknown = all(problem.category == "unknown_format" for problem in problems)
    findings.refuse(
        f"{len(problems)} of {total} rows of {argument}={data!r} cannot be used:{shown}"
        + (f"\n   - and {more} more" if more > 0 else ""),
        "\n   Call inspect_dataset on it: it says which columns to give."
        if is_unknown
        else "\n   Mend them, or leave them out with build_datums(skip_invalid=true) and give its "
        "data_id.",
    )
