"""One pass over a dataset: what it is, what is wrong with it, how long it is in tokens.

Memory stays bounded whatever the file's length: problems are counted and a few kept, duplicates
are known by 8 bytes a row, and tokens are counted on a sample and on the rows with most text.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tinker_mcp.training import building, files, formats, marking, rendering, roots
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.datums import TokenStatistics, measure, render
from tinker_mcp.training.formats import Columns, Conversation, Example, Layout, Pair
from tinker_mcp.training.problems import Category, Problem
from tinker_mcp.training.rendering import ModelRenderer
from tinker_mcp.training.verdicts import Counted, Verdict, verdicts

if TYPE_CHECKING:
    import tinker

SAMPLED_ROWS = 1000
LONGEST_ROWS = 32
_KEPT_PROBLEMS = 3
_KEPT_COLUMNS = 64
_MAX_DIGESTS = 2_000_000  # about 200 MB
_UNCUT = 2**40  # over-length rows are measured whole


@dataclass(frozen=True)
class InspectPlan:
    """What inspect_dataset asks for."""

    path: str
    base_model: str | None
    columns: Columns
    max_length: int


@dataclass
class Findings:
    """The problems of one category: all counted, the first few kept."""

    count: int = 0
    first: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        self.count += 1
        if len(self.first) < _KEPT_PROBLEMS:
            self.first.append(problem)


@dataclass
class Pass:
    """What one pass over the rows has seen.

    Attributes:
        sample: Examples drawn evenly (reservoir sampling); all of them in a small file.
        longest: (characters, number, example), a heap of those with most text.
        digests: Of the rows, with the number of the first that has it.
    """

    total: int = 0
    usable: Counter[Layout] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    prompts: int = 0
    failures: dict[Layout, Problem] = field(default_factory=dict)
    columns: Counter[str] = field(default_factory=Counter)
    lists: Counter[str] = field(default_factory=Counter)
    findings: dict[Category, Findings] = field(default_factory=dict)
    sample: list[Example] = field(default_factory=list)
    longest: list[tuple[int, int, Example]] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)

    def note(self, problem: Problem) -> None:
        """Count a problem."""
        self.findings.setdefault(problem.category, Findings()).add(problem)


@dataclass(frozen=True)
class Tokens:
    """Token statistics of the examples that were rendered.

    Attributes:
        rendered: How many examples; `is_sample` when there are more.
        over_length: How many of these are longer than max_length.
        example: One with its trained tokens marked; None when none could be rendered.
    """

    renderer: str
    rendered: int
    is_sample: bool
    max_length: int
    over_length: int
    statistics: TokenStatistics | None
    example: str | None


@dataclass(frozen=True)
class Inspection:
    """What a dataset is, is good for, and what is wrong with it."""

    file_format: str
    rows: int
    layouts: Mapping[str, int]
    columns: Mapping[str, int]
    verdicts: list[Verdict]
    findings: Mapping[Category, Findings]
    tokens: Tokens | None
    backend: Backend | None


async def inspect(workspace: Workspace, plan: InspectPlan) -> Inspection | None:
    """Read a file once; None when it takes longer than a call may (ask again).

    Raises:
        InvalidInputError: The path lies outside the roots, or is no file that can be read.
        NotFoundError: There is no such file.
    """
    deadline = workspace.deadline()
    building.check_columns(plan.columns)
    path = roots.allowed(plan.path, workspace.connector.settings)
    file_format = await anyio.to_thread.run_sync(files.file_format, path, plan.path)
    backend, max_length = None, plan.max_length
    if plan.base_model is not None:
        backend, capabilities = await workspace.ask(
            "capabilities", lambda rest: rest.get_server_capabilities()
        )
        limit = building.context_length(capabilities, plan.base_model)
        max_length = min(max_length, limit or max_length)

    async def start() -> Inspection:
        seen, tokens = await anyio.to_thread.run_sync(_look, path, plan, backend, max_length)
        return Inspection(
            file_format=file_format,
            rows=seen.total,
            layouts=dict(seen.seen.most_common()),
            columns=dict(seen.columns.most_common()),
            verdicts=verdicts(_counted(seen, plan)),
            findings=seen.findings,
            tokens=tokens,
            backend=backend,
        )

    return await workspace.unfinished.finish(("inspect", repr(plan)), start, backend, deadline)


def look(rows: Iterator[files.Row], columns: Columns) -> Pass:
    """Pass over the rows once. Blocks."""
    seen = Pass()
    among = formats.preferred(columns)
    draw = random.Random(0)  # noqa: S311 - the same sample at every call
    for place, row in rows:
        seen.total += 1
        if isinstance(row, Problem):
            seen.note(row)
            continue
        found = _sorted_in(seen, place, formats.mapped(row, columns), among)
        _note_duplicate(seen, place, row)
        if isinstance(found, Problem):
            seen.note(found)
        else:
            _keep(seen, found, draw)
    return seen


def _look(
    path: Path, plan: InspectPlan, backend: Backend | None, max_length: int
) -> tuple[Pass, Tokens | None]:
    # The model first: a wrong name should not cost a pass over the file.
    model = (
        rendering.load(backend, plan.base_model, None)
        if backend is not None and plan.base_model is not None
        else None
    )
    seen = look(files.rows(path, plan.path), plan.columns)
    return seen, None if model is None else measured(seen, model, max_length)


def _sorted_in(seen: Pass, place: str, row: Any, among: Sequence[Layout]) -> Example | Problem:
    layout = formats.layout(row, among)
    seen.seen[layout or "unknown"] += 1
    if isinstance(row, Mapping):
        _note_columns(seen, row)
    if layout is None:
        return formats.unknown(place, row)
    found = formats.example(place, row, layout)
    if not isinstance(found, Problem):
        seen.usable[layout] += 1
        seen.prompts += layout != "text"
    elif layout == "prompt" or (found.category in ("no_reply", "empty_reply", "equal_pair")):
        seen.prompts += 1
    if isinstance(found, Problem):
        seen.failures.setdefault(layout, found)
    return found


def _note_columns(seen: Pass, row: Mapping[str, Any]) -> None:
    for key, value in row.items():
        # Half a surrogate pair would end the reply, which is UTF-8.
        name = str(key).encode("utf-8", "backslashreplace").decode()
        if value is not None and (name in seen.columns or len(seen.columns) < _KEPT_COLUMNS):
            seen.columns[name] += 1
            seen.lists[name] += isinstance(value, list)


def _note_duplicate(seen: Pass, place: str, row: Any) -> None:
    text = json.dumps(row, sort_keys=True, default=str)
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    first = seen.digests.get(digest)
    if first is not None:
        seen.note(Problem(place, f"the same as {first}", "duplicate"))
    elif len(seen.digests) < _MAX_DIGESTS:
        seen.digests[digest] = place


def _keep(seen: Pass, example: Example, draw: random.Random) -> None:
    number = sum(seen.usable.values())
    if len(seen.sample) < SAMPLED_ROWS:
        seen.sample.append(example)
    elif (slot := draw.randrange(number)) < SAMPLED_ROWS:
        seen.sample[slot] = example
    item = (_characters(example), number, example)
    if len(seen.longest) < LONGEST_ROWS:
        heapq.heappush(seen.longest, item)
    else:
        heapq.heappushpop(seen.longest, item)


def _characters(example: Example) -> int:
    if isinstance(example, Conversation):
        return sum(len(str(message["content"])) for message in example.messages)
    if isinstance(example, Pair):
        sides = (example.chosen, example.rejected)
        return max(sum(len(str(m["content"])) for m in side) for side in sides)
    return len(example.text)


def measured(seen: Pass, model: ModelRenderer, max_length: int) -> Tokens:
    """Count the tokens of the sample, and look for over-length in it and the longest rows."""
    places = {example.place for example in seen.sample}
    others = [item[2] for item in sorted(seen.longest, key=lambda item: item[1])]
    extra = [example for example in others if example.place not in places]
    datums: list[tinker.Datum] = []
    over_length = 0
    example = None
    for one in [*seen.sample, *extra]:
        made = render([one], model, "all_assistant_messages", _UNCUT, "none")
        for problem in made.problems:
            seen.note(problem)
        if not made.datums:
            continue
        example = example or marking.marked(made.datums[0], model)
        length = max(datum.model_input.length + 1 for datum in made.datums)
        if length > max_length:
            over_length += 1
            what = f"{length} tokens, more than max_length {max_length}; it would lose its end"
            seen.note(Problem(one.place, what, "over_length"))
        if one.place in places:
            datums += made.datums
    return Tokens(
        renderer=model.name,
        rendered=len(seen.sample) + len(extra),
        is_sample=sum(seen.usable.values()) > len(seen.sample),
        max_length=max_length,
        over_length=over_length,
        statistics=measure(datums) if datums else None,
        example=example,
    )


def _counted(seen: Pass, plan: InspectPlan) -> Counted:
    return Counted(
        path=plan.path,
        base_model=plan.base_model,
        mapping=plan.columns,
        total=seen.total,
        usable=seen.usable,
        prompts=seen.prompts,
        failures={k: v for k, v in seen.failures.items() if not seen.usable[k]},
        columns=seen.columns,
        lists=seen.lists,
    )
