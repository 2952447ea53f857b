"""estimate_cost."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.server.boundary import problems
from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    ToolContext,
    finite,
    workspace_of,
)
from tinker_mcp.server.tools.run_replies import short
from tinker_mcp.settings import Settings
from tinker_mcp.training import prices

if TYPE_CHECKING:
    from tinker_mcp.runs.planning.plan import Planned


class CostEstimate(BaseModel):
    finished: bool
    backend: str | None = None
    usd_low: float | None = Field(default=None, description="None: the price is unknown.")
    usd_high: float | None = Field(default=None, description="With one crash before a checkpoint.")
    usd_per_million: float | None = None
    price_source: str | None = None
    price_date: str | None = None
    seconds: float | None = None
    seconds_source: str | None = None
    tokens: dict[str, int] = {}
    steps: int | None = None
    learning_rate: float | None = None
    learning_rate_source: str | None = None
    warnings: list[str] = []
    next_step: str


async def estimate_cost(
    ctx: ToolContext,
    spec: Annotated[dict[str, Any], Field(description="The arguments of start_run.")],
) -> CostEstimate:
    """Check a run and say what it would cost, or how long it takes on the local backend. Free.

    Counts the tokens of the rendered data, times a dated price. Next: start_run.
    """
    from tinker_mcp.runs.planning.plan import forecast

    planned = await forecast(workspace_of(ctx), run_arguments(spec))
    if planned is None:
        return CostEstimate(finished=False, next_step=STILL_RUNNING.format(tool="estimate_cost"))
    estimate, price = planned.estimate, planned.estimate.price
    return CostEstimate(
        finished=True,
        backend=estimate.backend,
        usd_low=short(estimate.usd_low),
        usd_high=short(estimate.usd_high),
        usd_per_million=price and price.usd_per_million,
        price_source=price and price.source,
        price_date=price and str(price.date),
        seconds=short(estimate.seconds),
        seconds_source=estimate.seconds_source or None,
        tokens=dict(estimate.tokens),
        steps=planned.spec.steps,
        learning_rate=finite(planned.spec.learning_rate),
        learning_rate_source=planned.spec.learning_rate_source,
        warnings=list(planned.warnings),
        next_step=_next(planned, workspace_of(ctx).connector.settings),
    )


def _next(planned: Planned, settings: Settings) -> str:
    usd = planned.estimate.usd_high
    if usd is None:
        return (
            f"The price of {planned.spec.base_model} is unknown: put it into "
            f"{prices.own_file(settings.home)}, then call again."
        )
    if usd == 0:
        return "Call start_run with the same arguments."
    return f"Ask the user, then call start_run with max_usd={math.ceil(usd * 100) / 100}."


def run_arguments(spec: dict[str, Any]) -> RunArguments:
    """The arguments of a run, none of them coerced to another type; a `ttl_s` of 0 is for ever.

    Raises:
        InvalidInputError: One is unknown, missing or out of its range.
    """
    meant = {**spec, "ttl_s": None} if spec.get("ttl_s") == 0 else spec
    try:
        return RunArguments.model_validate_json(json.dumps(meant), strict=True)
    except ValidationError as error:
        raise InvalidInputError(
            problems(error, RunArguments), next_step="Mend that, then call again."
        ) from error
