"""What the tools share: arguments, and the habits of their replies.

Each reply is a pydantic model whose last field is `next_step`, the next sensible call.
"""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

from mcp.server.mcpserver import Context
from pydantic import BeforeValidator, Field

from tinker_mcp.training.clients import Workspace

ToolContext: TypeAlias = Context[Workspace]

ClientId: TypeAlias = str  # "client-1"
DataId = Annotated[str, Field(description="From build_datums.")]
CheckpointPath = Annotated[str, Field(pattern=r"^tinker://[!-~]+$")]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _whole(value: object) -> object:
    """An integer as JSON Schema has it: 3.0 is one."""
    is_integral = isinstance(value, float) and value.is_integer()
    return int(value) if is_integral else _no_bool(value)  # type: ignore[call-overload]


Whole: TypeAlias = Annotated[int, BeforeValidator(_whole)]
Number: TypeAlias = Annotated[float, BeforeValidator(_no_bool)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
LearningRate = Annotated[Number, Field(gt=0, le=10)]
WeightDecay = Annotated[Number, Field(ge=0, le=1e30)]
GradClipNorm = Annotated[Number, Field(ge=0, le=1e6)]


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
