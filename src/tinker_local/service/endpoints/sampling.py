"""Sampling: the server half of `tinker/resources/sampling.py`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from tinker_local.errors import UserInputError
from tinker_local.ops import Sample, SampleOutput
from tinker_local.service import wire
from tinker_local.service.backend import backend_of
from tinker_local.service.endpoints.bodies import parse
from tinker_local.service.futures import Reply
from tinker_local.service.usage import usage_of


async def asample(request: Request) -> Response:
    """Promise `num_samples` continuations of a prompt."""
    backend, usage = backend_of(request), usage_of(request)
    wanted = await parse(request, types.SampleRequest)
    if wanted.sampling_session_id is None:
        raise UserInputError("asample names no sampling client.", "Use the tinker SDK 0.38.")
    sampler = backend.sessions.sampler(wanted.sampling_session_id)

    def read() -> Sample:
        return wire.sample_op(wanted, sampler.weights)

    def encode(output: SampleOutput) -> Reply:
        model, session = sampler.weights.base_model, sampler.session_id
        prompt_tokens = output.prompt_tokens or wanted.prompt.length
        read_tokens = prompt_tokens - output.cached_tokens
        usage.add("sampling_prefill", model, read_tokens, session)
        usage.add("sampling_prefill_cached", model, output.cached_tokens, session)
        sampled = sum(len(sequence.tokens) for sequence in output.sequences)
        usage.add("sampling_sample", model, sampled, session)
        return wire.sample_reply(output, wanted)

    future = backend.promise_sample(sampler, wanted.seq_id or 0, read, encode)
    return JSONResponse(
        {
            "request_id": future.request_id,
            "sample_sequence_ids": [f"{future.request_id}:{n}" for n in range(wanted.num_samples)],
        }
    )
