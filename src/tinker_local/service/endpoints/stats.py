"""What the server is doing: `GET /stats`."""

from __future__ import annotations

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_local.service.backend import backend_of
from tinker_local.service.usage import usage_of


async def stats(request: Request) -> Response:
    """Queues, tokens since the start, and cycles where the hosted clock is simulated."""
    scheduler = backend_of(request).scheduler
    load, clock = scheduler.load, scheduler.clock
    # The end of a session is work too, but no training client's.
    cycles = {lane: used for lane, used in clock.cycles().items() if ":train:" in lane}
    return JSONResponse(
        {
            "queued_training_requests": load.training,
            "active_sample_requests": load.samples,
            "tokens": usage_of(request).since_start(),
            "cycle_s": clock.cycle_s,
            "cycles": clock.ticks,
            "cycles_by_training_client": {lane: asdict(used) for lane, used in cycles.items()},
        }
    )
