"""create_server: one lifespan, one table of tools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mcp.server.caching import CacheableMethod, CacheHint
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, GetPromptResult, Icon, InputRequiredResult

from tinker_mcp import __version__
from tinker_mcp.server.boundary import StrictTool, ToolSpec, changes, destroys, reads
from tinker_mcp.server.completions import add_completions
from tinker_mcp.server.prompts import prompts
from tinker_mcp.server.resources import add_resources
from tinker_mcp.server.skills import add_skill_files, extensions
from tinker_mcp.server.tools import (
    checkpoints,
    clients,
    costs,
    data,
    docs,
    inspection,
    rewards,
    runs,
    sampling,
    setup,
    training,
)
from tinker_mcp.settings import Settings
from tinker_mcp.training.backend import BackendConnector
from tinker_mcp.training.clients import Workspace

INSTRUCTIONS = """\
Fine-tune language models on Tinker. Without an API key everything runs on a local backend that \
really trains a small model on this machine; nothing needs to be installed or started first.

A first run: check_setup -> list_models -> build_datums(path, base_model, eval_share=0.1) -> \
create_training_client -> forward_backward(eval data, forward_only=true) for the loss before -> \
train(client, data, steps, batch_size, learning_rate), called again with the same arguments until \
finished -> the loss after, and sample before and after -> save_checkpoint.

More than a minute of SFT or DPO: start_run checks everything and trains in a process of its own, \
which outlives this call, server and host; max_usd caps it, estimate_cost tells the price before. \
Then wait_for_run until finished -> get_run(plot=true) -> sample(run_id=...). A stopped or crashed \
run goes on with resume_run; list_runs has those of earlier servers.

Reinforcement by hand: sample several answers to a prompt; they are kept as a group under a \
handle. Score each answer yourself, then build_datums makes policy-gradient datums of the group's \
handle and your rewards, and forward_backward with optim trains on them. Sample again after each \
step.

Handles (client-1, data-1) live as long as this server; runs and checkpoints (tinker://...) stay. \
Tokens never pass through you. Every reply ends with next_step. A reply with finished=false means \
the work goes on: call again with the same arguments to collect it. Unsure? search_docs has \
pitfalls, losses, hyper-parameters, runs, errors and workflows, offline.
"""

WEBSITE = "https://tinker-docs.thinkingmachines.ai"
ICON = Icon(  # a falling loss
    src="data:image/svg+xml,%3Csvg%20xmlns='http://www.w3.org/2000/svg'%20viewBox='0%200%2024%2024'"
    "%3E%3Crect%20width='24'%20height='24'%20rx='5'%20fill='%23124'/%3E%3Cpath%20"
    "d='M4%205c3%2011%207%2013%2016%2013'%20fill='none'%20stroke='%23fb3'%20stroke-width='2.5'%20"
    "stroke-linecap='round'/%3E%3C/svg%3E",
    mime_type="image/svg+xml",
    sizes=["any"],
)

# What a server offers is fixed when it starts, and the same for every caller.
_FIXED = CacheHint(ttl_ms=3_600_000, scope="public")
_CACHE_HINTS: dict[CacheableMethod, CacheHint] = {
    "tools/list": _FIXED,
    "prompts/list": _FIXED,
    "resources/list": _FIXED,
    "resources/templates/list": _FIXED,
    "server/discover": _FIXED,
}

TOOLS: tuple[ToolSpec, ...] = (
    reads(setup.check_setup, "Check the set-up"),
    reads(setup.list_models, "List models"),
    reads(docs.search_docs, "Search the docs", toolset="setup"),
    reads(inspection.inspect_dataset, "Inspect a dataset", toolset="data"),
    changes(data.build_datums, "Build datums"),
    changes(training.create_training_client, "Create a training client"),
    reads(clients.list_clients, "List training clients", toolset="training"),
    destroys(clients.close_client, "Close a training client", toolset="training"),
    changes(training.forward_backward, "Compute gradients"),
    changes(training.optim_step, "Take an optimizer step"),
    changes(training.train, "Train for many steps"),
    changes(sampling.sample, "Sample"),
    changes(sampling.compute_logprobs, "Score a text"),
    changes(checkpoints.save_checkpoint, "Save a checkpoint"),
    reads(checkpoints.list_checkpoints, "List checkpoints"),
    destroys(checkpoints.manage_checkpoint, "Manage a checkpoint"),
    changes(checkpoints.export_weights, "Export weights"),
    reads(costs.estimate_cost, "Estimate a run's cost", toolset="runs"),
    changes(runs.start_run, "Start a run"),
    reads(runs.list_runs, "List runs"),
    reads(runs.get_run, "Show a run"),
    reads(runs.wait_for_run, "Wait for a run"),
    destroys(runs.stop_run, "Stop a run"),
    changes(runs.resume_run, "Resume a run"),
    changes(rewards.test_reward, "Test a reward", toolset="runs"),
)


class _Server(MCPServer[Workspace]):
    """Says which prompts there are, where the SDK would answer "Internal server error"."""

    async def get_prompt(
        self, name: str, arguments: dict[str, Any] | None = None, context: Any = None
    ) -> GetPromptResult | InputRequiredResult:
        known = [prompt.name for prompt in await self.list_prompts()]
        if name not in known:
            problem = f"Unknown prompt {name!r}; there are: {', '.join(known)}."
            raise MCPError(code=INVALID_PARAMS, message=problem)
        return await super().get_prompt(name, arguments, context)


def create_server(settings: Settings) -> MCPServer[Workspace]:
    """An MCP server for `settings`; nothing heavy is imported until a tool needs it."""
    workspaces: list[Workspace] = []  # of the running server: one at most

    @asynccontextmanager
    async def lifespan(_: MCPServer[Workspace]) -> AsyncIterator[Workspace]:
        workspace = Workspace(BackendConnector(settings))
        workspaces.append(workspace)
        try:
            yield workspace
        finally:
            workspaces.remove(workspace)
            await workspace.close()
            workspace.connector.close()

    def opened() -> Workspace:
        if not workspaces:
            raise ResourceError("The server is not running.")
        return workspaces[-1]

    server = _Server(
        "tinker-mcp",
        title="Tinker fine-tuning",
        description="Fine-tune language models on Tinker, or on this machine without a key.",
        instructions=INSTRUCTIONS,
        website_url=WEBSITE,
        icons=[ICON],
        version=__version__,
        tools=[StrictTool.of(spec, settings.home / "replies") for spec in offered(settings)],
        log_level="WARNING",
        lifespan=lifespan,
        cache_hints=_CACHE_HINTS,
        extensions=extensions(),
    )
    for prompt in prompts():
        server.add_prompt(prompt)
    add_resources(server, opened)
    add_skill_files(server)
    add_completions(server, opened)
    return server


def offered(settings: Settings) -> list[ToolSpec]:
    """The tools of the chosen toolsets; the reading ones only, if the settings say so."""
    return [
        spec
        for spec in TOOLS
        if spec.toolset in settings.toolsets
        and (spec.annotations.read_only_hint or not settings.read_only)
    ]
