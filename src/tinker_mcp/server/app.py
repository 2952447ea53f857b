"""create_server: one lifespan, one table of tools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mcp.server.mcpserver import MCPServer

from tinker_mcp import __version__
from tinker_mcp.server.boundary import StrictTool, ToolSpec, changes, reads
from tinker_mcp.server.tools import checkpoints, data, sampling, setup, training
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

Handles (client-1, data-1) live as long as this server; checkpoints (tinker://...) stay. Tokens \
never pass through you. Every reply ends with next_step. A reply with finished=false means the \
work goes on: call again with the same arguments to collect it.
"""

TOOLS: tuple[ToolSpec, ...] = (
    reads(setup.check_setup, "Check the set-up"),
    reads(setup.list_models, "List models"),
    changes(data.build_datums, "Build datums"),
    changes(training.create_training_client, "Create a training client"),
    changes(training.forward_backward, "Compute gradients"),
    changes(training.optim_step, "Take an optimizer step"),
    changes(training.train, "Train for many steps"),
    changes(sampling.sample, "Sample"),
    changes(checkpoints.save_checkpoint, "Save a checkpoint"),
    reads(checkpoints.list_checkpoints, "List checkpoints"),
)


def create_server(settings: Settings) -> MCPServer[Workspace]:
    """An MCP server for `settings`; nothing heavy is imported until a tool needs it."""

    @asynccontextmanager
    async def lifespan(_: MCPServer[Workspace]) -> AsyncIterator[Workspace]:
        workspace = Workspace(BackendConnector(settings))
        try:
            yield workspace
        finally:
            await workspace.close()

    return MCPServer(
        "tinker-mcp",
        title="Tinker fine-tuning",
        instructions=INSTRUCTIONS,
        version=__version__,
        tools=[StrictTool.of(spec) for spec in TOOLS],
        log_level="WARNING",
        lifespan=lifespan,
    )
