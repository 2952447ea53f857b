"""Sampling: the server half of `tinker/resources/sampling.py`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from tinker_local.errors import UserInputError
from tinker_local.service import wire
from tinker_local.service.backend import backend_of
from tinker_local.service.endpoints.bodies import parse
from tinker_local.service.futures import Reply


async def asample(request: Request) -> Response:
    """Promise `num_samples` continuations of a prompt."""
    backend = backend_of(request)
    wanted = await parse(request, types.SampleRequest)
    if wanted.sampling_session_id is None:
        raise UserInputError("asample names no sampling client.", "Use the tinker SDK 0.38.")
    sampler = backend.sessions.sampler(wanted.sampling_session_id)
    request_id = f"{sampler.sampler_id}:{wanted.seq_id}"

    def work() -> Reply:
        op = wire.sample_op(wanted, sampler.weights)
        return wire.sample_reply(backend.engine.sample(op, lambda: future.is_cancelled))

    future = backend.promise(request_id, sampler.session_id, work)
    return JSONResponse(
        {
            "request_id": request_id,
            "sample_sequence_ids": [f"{request_id}:{n}" for n in range(wanted.num_samples)],
        }
    )
