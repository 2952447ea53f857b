"""start_run, list_runs, get_run, wait_for_run, stop_run and resume_run.

Runs live in processes of their own and on disk: reading them needs no backend, and they go on
when this server ends.
"""

from __future__ import annotations

import base64
import time
from functools import partial
from typing import Annotated, Any, Literal

import anyio
from anyio.to_thread import run_sync
from mcp_types import CallToolResult, ContentBlock, ImageContent, TextContent
from pydantic import Field, WithJsonSchema

from tinker_mcp.runs.planning.arguments import WEEK_S
from tinker_mcp.runs.spec import LoggerName, LrSchedule, Method
from tinker_mcp.runs.states import ACTIVE, RunState
from tinker_mcp.server.tools import run_reading, run_starting
from tinker_mcp.server.tools.costs import run_arguments
from tinker_mcp.server.tools.replies import (
    Number,
    Seed,
    ToolContext,
    Whole,
    workspace_of,
)
from tinker_mcp.server.tools.run_replies import (
    RunDetails,
    RunMoved,
    Runs,
    StartedRun,
    WaitedRun,
    moved,
    waited,
)

_LOOK_EVERY_S = 0.25

Auto = Annotated[Literal["auto"], WithJsonSchema({"enum": ["auto"]})]  # not every host knows const
RunId = Annotated[str, Field(min_length=1, max_length=128)]


async def start_run(
    ctx: ToolContext,
    method: Method,
    data: Annotated[str | None, Field(description="A path, or data-N.")] = None,
    base_model: str | None = None,
    checkpoint: Annotated[str | None, Field(description="Or start from it.")] = None,
    eval_data: str | None = None,
    eval_share: Annotated[Number | None, Field(description="Or a share of data.")] = None,
    steps: Whole | None = None,
    epochs: Annotated[Number | None, Field(description="Default 1.")] = None,
    batch_size: Annotated[
        Whole | None, Field(description="Default 32; dpo 16 pairs, rl 16 groups.")
    ] = None,
    learning_rate: Number | Auto = "auto",
    lr_schedule: LrSchedule = "linear",
    rank: Whole | None = None,
    renderer: str | None = None,
    max_length: Whole | None = None,
    train_on_what: Annotated[str | None, Field(description="As in build_datums.")] = None,
    beta: Annotated[Number | None, Field(description="Of dpo.")] = None,
    rl: Annotated[
        dict[str, Any] | None,
        Field(description="reward or environment, ...: search_docs."),
    ] = None,
    distill: Annotated[
        dict[str, Any] | None,
        Field(description="teacher, mode, system_prompt: search_docs."),
    ] = None,
    save_every: Whole | None = None,
    eval_every: Whole | None = None,
    ttl_s: Annotated[Whole, Field(description="0: checkpoints stay.")] = WEEK_S,
    seed: Seed = 0,
    name: str | None = None,
    max_usd: Annotated[Number | None, Field(description="Needed where it costs.")] = None,
    idempotency_key: str | None = None,
    loggers: tuple[LoggerName, ...] = (),
    columns: dict[str, str] | None = None,
    accept: Annotated[
        tuple[str, ...], Field(description="Checks to let pass, as their errors name them.")
    ] = (),
) -> StartedRun:
    """Start a training run that goes on without this call, server or host. Spends up to max_usd.

    distill learns from a teacher, prompt_distill a system prompt. Checks all that is free first;
    estimate_cost tells the price. A repeated idempotency_key starts nothing. Next: wait_for_run.
    """
    asked = {key: value for key, value in locals().items() if key != "ctx"}
    deadline = time.monotonic() + run_starting.LIMIT_S
    arguments = run_arguments(asked | {"columns": columns or {}})
    return await run_starting.started(workspace_of(ctx), arguments, deadline)


async def list_runs(
    ctx: ToolContext,
    state: RunState | None = None,
    limit: Annotated[Whole, Field(ge=1, le=50)] = 20,
) -> Runs:
    """List training runs, newest first, those of earlier servers too. Free. Next: get_run."""
    settings = workspace_of(ctx).connector.settings
    return await run_sync(run_reading.listed, settings, state, limit)


async def get_run(
    ctx: ToolContext,
    run_id: RunId,
    metrics: Annotated[tuple[str, ...], Field(description="Default: the losses.")] = (),
    points: Annotated[Whole, Field(ge=0, le=200, description="Of each series.")] = 20,
    plot: Annotated[bool, Field(description="Also the loss curve as an image.")] = False,
    log_lines: Annotated[Whole, Field(ge=0, le=100)] = 0,
    transcripts: Annotated[Whole, Field(ge=0, le=20, description="Newest samples of rl.")] = 0,
) -> Annotated[CallToolResult, RunDetails]:
    """Show a run: state, losses, speed, cost, time left, checkpoints, warnings, series. Free."""
    settings = workspace_of(ctx).connector.settings
    run_id = await run_sync(run_reading.id_of, settings, run_id)
    found = await run_sync(
        run_reading.details, settings, run_id, metrics, points, log_lines, transcripts
    )
    content: list[ContentBlock] = [TextContent(type="text", text=found.model_dump_json(indent=2))]
    if plot:
        png = await run_sync(run_reading.plotted, settings, run_id)
        picture = base64.b64encode(png).decode()
        content.append(ImageContent(type="image", data=picture, mime_type="image/png"))
    return CallToolResult(content=content, structured_content=found.model_dump(mode="json"))


async def wait_for_run(
    ctx: ToolContext,
    run_id: RunId,
    until: Annotated[str, Field(description="completed, eval or step=N.")] = "completed",
    timeout_s: Annotated[Whole, Field(ge=0, le=50)] = 45,
) -> WaitedRun:
    """Wait for a run; returns early on a new evaluation, state or warning. Free.

    finished=false: call it again.
    """
    from tinker_mcp.runs.showing.views import Until

    deadline = time.monotonic() + timeout_s
    settings, goal = workspace_of(ctx).connector.settings, Until.parse(until)
    run_id = await run_sync(run_reading.id_of, settings, run_id)
    first = look = await run_sync(run_reading.look, settings, run_id, None)
    goal.check_reachable(first.row)
    reported = -1
    while not (is_met := goal.is_met(look.state, look.row.step, look.news)) and not look.news:
        if look.row.step > reported:
            reported = look.row.step
            await ctx.report_progress(reported, look.steps, look.progress)
        left = deadline - time.monotonic()
        if left <= 0:
            break
        await anyio.sleep(min(left, _LOOK_EVERY_S))
        look = await run_sync(run_reading.look, settings, run_id, first.began)
    shown = await run_sync(run_reading.summary, settings, run_id)
    return waited(shown, look.news, is_met or shown.state not in ACTIVE)


async def stop_run(
    ctx: ToolContext,
    run_id: RunId,
    save: Annotated[bool, Field(description="A checkpoint first.")] = True,
) -> RunMoved:
    """Stop a run after the steps that are on their way. resume_run goes on with it."""
    settings = workspace_of(ctx).connector.settings
    run_id = await run_sync(run_reading.id_of, settings, run_id)
    stop = partial(run_reading.supervisor(settings).stop, run_id, save=save)
    await run_sync(stop)
    return moved(await run_sync(run_reading.summary, settings, run_id))


async def resume_run(
    ctx: ToolContext,
    run_id: RunId,
    steps: Annotated[Whole | None, Field(description="A new total.")] = None,
    max_usd: Annotated[Number | None, Field(description="A new total.")] = None,
    accept_divergence: bool = False,
) -> RunMoved:
    """Go on with a stopped, failed or crashed run from its last checkpoint. Spends."""
    settings = workspace_of(ctx).connector.settings
    run_id = await run_sync(run_reading.id_of, settings, run_id)
    resume = partial(
        run_reading.supervisor(settings).resume,
        run_id,
        steps=steps,
        max_usd=max_usd,
        accept_divergence=accept_divergence,
    )
    await run_sync(resume)
    return moved(await run_sync(run_reading.summary, settings, run_id))
