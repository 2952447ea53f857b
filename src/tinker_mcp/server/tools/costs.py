"""estimate_cost."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.arguments import RunArguments
from tinker_mcp.server.boundary import problems
from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    ToolContext,
    finite,
    workspace_of,
)


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
    from tinker_mcp.runs.plan import forecast

    planned = await forecast(workspace_of(ctx), run_arguments(spec))
    if planned is None:
        return CostEstimate(finished=False, next_step=STILL_RUNNING.format(tool="estimate_cost"))
    estimate, price = planned.estimate, planned.estimate.price
    return CostEstimate(
        finished=True,
        backend=estimate.backend,
        usd_low=_dollars(estimate.usd_low),
        usd_high=_dollars(estimate.usd_high),
        usd_per_million=price and price.usd_per_million,
        price_source=price and price.source,
        price_date=price and str(price.date),
        seconds=None if estimate.seconds is None else round(estimate.seconds, 1),
        seconds_source=estimate.seconds_source or None,
        tokens=dict(estimate.tokens),
        steps=planned.spec.steps,
        learning_rate=finite(planned.spec.learning_rate),
        learning_rate_source=planned.spec.learning_rate_source,
        warnings=list(planned.warnings),
        next_step="Call start_run with the same arguments"
        + (f", max_usd of {estimate.usd_high:.2f} or more." if estimate.usd_high else "."),
    )


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


def _dollars(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
