"""What the tools share: arguments, and the habits of their replies.

Each reply is a pydantic model whose last field is `next_step`, the next sensible call.
"""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

from mcp.server.mcpserver import Context
from pydantic import Field

from tinker_mcp.training.clients import Workspace

ToolContext: TypeAlias = Context[Workspace]

ClientId = Annotated[str, Field(description='A training client\'s handle, such as "client-1".')]
DataId = Annotated[str, Field(description='A handle from build_datums, such as "data-1".')]
CheckpointPath = Annotated[str, Field(pattern=r"^tinker://.+")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
LearningRate = Annotated[
    float, Field(gt=0, description="Adam's learning rate; list_models advises one with its source.")
]


def workspace_of(ctx: ToolContext) -> Workspace:
    workspace: Workspace = ctx.request_context.lifespan_context
    return workspace


def backend_label(ctx: ToolContext) -> str | None:
    """The backend in use, for a reply to work that is not finished."""
    backend = workspace_of(ctx).connector.running()
    return None if backend is None else backend.label


STILL_RUNNING = "Still running, nothing is lost: call {tool} again with the same arguments."


def rounded(value: float, digits: int = 4) -> float:
    """A number short enough to read."""
    return float(f"{value:.{digits}g}")


def finite(value: float, digits: int = 6) -> float | None:
    """Rounded; None for NaN and infinities, which JSON cannot say."""
    return rounded(value, digits) if math.isfinite(value) else None
