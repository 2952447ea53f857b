"""inspect_dataset."""

from __future__ import annotations

from typing import Annotated

from anyio.to_thread import run_sync
from pydantic import BaseModel, Field

from tinker_mcp.server.tools.data import Columns, Tokens
from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    ToolContext,
    backend_label,
    workspace_of,
)
from tinker_mcp.training import inspection, libraries
from tinker_mcp.training.inspection import Inspection, InspectPlan
from tinker_mcp.training.verdicts import Fitness, Method

_SHOWN_COLUMNS = 24


class MethodVerdict(BaseModel):
    method: Method
    verdict: Fitness
    why: str
    call: str


class FoundProblem(BaseModel):
    problem: str
    count: int
    first: list[str]


class DatasetReport(BaseModel):
    finished: bool
    file_format: str | None = None
    rows: int = 0
    layouts: dict[str, int] = {}
    columns: dict[str, int] = Field(default={}, description="Rows that have it.")
    verdicts: list[MethodVerdict] = []
    problems: list[FoundProblem] = []
    renderer: str | None = None
    tokens: Tokens | None = Field(default=None, description="Of the rows in tokens_of.")
    tokens_of: str | None = None
    example: str | None = Field(default=None, description="Trained tokens between ⟦ and ⟧.")
    backend: str | None = None
    next_step: str


async def inspect_dataset(
    ctx: ToolContext,
    path: Annotated[str, Field(description="JSONL, JSON, CSV or Parquet.")],
    base_model: Annotated[str | None, Field(description="For tokens, loss mask.")] = None,
    columns: Columns | None = None,
    max_length: Annotated[int, Field(ge=2)] = 2048,
) -> DatasetReport:
    """Say what a dataset is, which training methods can use it and how, and what is wrong. Free.

    Next: the call in your method's verdict.
    """
    plan = InspectPlan(path, base_model, columns or {}, max_length)
    workspace = workspace_of(ctx)
    found = await inspection.inspect(workspace, plan)
    if not libraries.are_loaded():  # the next call will want them: the agent thinks meanwhile
        workspace.unfinished.begin("libraries", lambda: run_sync(libraries.load))
    if found is None:
        return DatasetReport(
            finished=False,
            backend=backend_label(ctx),
            next_step=STILL_RUNNING.format(tool="inspect_dataset"),
        )
    return _report(found)


def _report(found: Inspection) -> DatasetReport:
    tokens = found.tokens
    statistics = tokens.statistics if tokens else None
    return DatasetReport(
        finished=True,
        file_format=found.file_format,
        rows=found.rows,
        layouts=dict(found.layouts),
        columns={name[:60]: found.columns[name] for name in list(found.columns)[:_SHOWN_COLUMNS]},
        verdicts=[
            MethodVerdict(method=v.method, verdict=v.fitness, why=v.why, call=v.call)
            for v in found.verdicts
        ],
        problems=[
            FoundProblem(
                problem=name,
                count=findings.count,
                first=[str(problem)[:200] for problem in findings.first],
            )
            for name, findings in found.findings.items()
        ],
        renderer=tokens.renderer if tokens else None,
        tokens=Tokens(**vars(statistics)) if statistics else None,
        tokens_of=_tokens_of(found),
        example=tokens.example if tokens else None,
        backend=found.backend.label if found.backend else None,
        next_step=_next_step(found),
    )


def _tokens_of(found: Inspection) -> str | None:
    if found.tokens is None:
        return None
    if not found.tokens.is_sample:
        return "all usable rows"
    return (
        f"{inspection.SAMPLED_ROWS} rows drawn from all usable ones; over_length was also looked "
        f"for in the {inspection.LONGEST_ROWS} rows with most text"
    )


def _next_step(found: Inspection) -> str:
    ready = [v for v in found.verdicts if v.fitness == "ready"]
    mapped = [v for v in found.verdicts if v.fitness == "needs_mapping"]
    best = (ready + mapped)[:1]
    if not best:
        return 'Convert the file: one {"messages": [...]} a line is what most methods take.'
    if found.tokens is None:
        return f"Give base_model too for tokens and the loss mask, or call {best[0].call}"
    return f"Call {best[0].call}"
