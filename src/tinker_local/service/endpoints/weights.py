"""Saving checkpoints: the server half of `tinker/resources/weights.py`."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from tinker import types

from tinker_local.errors import UserInputError
from tinker_local.ops import SavedWeights
from tinker_local.service import exports
from tinker_local.service.backend import Backend, backend_of
from tinker_local.service.checkpoints import NewCheckpoint
from tinker_local.service.endpoints.bodies import parse, promised
from tinker_local.service.futures import Reply
from tinker_local.service.sessions import Sampler
from tinker_local.service.wire import json_reply


async def save_weights(request: Request) -> Response:
    """Promise a saved state: weights and optimizer."""
    backend = backend_of(request)
    wanted = await parse(request, types.SaveWeightsRequest)
    seq_id = wanted.seq_id or 0
    new = NewCheckpoint(
        run_id=wanted.model_id,
        kind="weights",
        name=_name(wanted.path, seq_id),
        ttl_s=wanted.ttl_seconds,
        user_metadata=wanted.user_metadata,
        overwrite=wanted.overwrite,
    )

    def work() -> Reply:
        saved = backend.catalog.save(
            new, lambda folder: backend.engine.save_state(wanted.model_id, folder)
        )
        return json_reply({"type": "save_weights", "path": saved.path})

    return promised(backend.promise_in_order(wanted.model_id, seq_id, work))


async def save_weights_for_sampler(request: Request) -> Response:
    """Promise weights to sample from: a checkpoint with a name, or an unnamed sampler."""
    backend = backend_of(request)
    wanted = await parse(request, types.SaveWeightsForSamplerRequest)
    seq_id = wanted.seq_id or 0

    def work() -> Reply:
        if wanted.sampling_session_seq_id is not None:
            return _unnamed_sampler(backend, wanted, wanted.sampling_session_seq_id)
        if wanted.kind != "snapshot":
            raise UserInputError(
                f"{wanted.kind} weights have no name.", "Leave the name out, or save a snapshot."
            )
        new = NewCheckpoint(
            run_id=wanted.model_id,
            kind="sampler_weights",
            name=_name(wanted.path, seq_id),
            ttl_s=wanted.ttl_seconds,
            user_metadata=wanted.user_metadata,
        )
        saved = backend.catalog.save(
            new, lambda folder: backend.engine.save_sampler(wanted.model_id, folder)
        )
        return json_reply({"type": "save_weights_for_sampler", "path": saved.path})

    return promised(backend.promise_in_order(wanted.model_id, seq_id, work))


async def save_weights_external(request: Request) -> Response:
    """Promise an export: the adapter as PEFT reads it, encrypted where the client asks for it."""
    backend = backend_of(request)
    wanted = await parse(request, types.SaveWeightsExternalRequest)
    new = NewCheckpoint(wanted.model_id, "external_weights", wanted.path, wanted.ttl_seconds)
    keys = wanted.age_encryption_recipients

    def work() -> Reply:
        recipients = None if keys is None else exports.parse_recipients(keys)

        def write(folder: Path) -> None:
            backend.engine.save_sampler(wanted.model_id, folder)
            exports.keep_peft_files(folder)
            if recipients is not None:
                exports.encrypt_files(folder, recipients)

        saved = backend.catalog.save(new, write)
        return json_reply(
            {
                "type": "save_weights_external",
                "path": saved.path,
                "size_bytes": saved.size_bytes,
            }
        )

    return promised(backend.promise_in_order(wanted.model_id, wanted.seq_id or 0, work))


def _name(wanted: str | None, seq_id: int) -> str:
    """What a save without a name is called: its place in the client's order, unique in its run."""
    return f"{seq_id:06d}" if wanted is None else wanted


def _unnamed_sampler(
    backend: Backend, wanted: types.SaveWeightsForSamplerRequest, number: int
) -> Reply:
    """A sampler on weights of its own, or on those that all in-flight samplers of a model share."""
    model = backend.sessions.model(wanted.model_id)
    sampler_id = f"{model.session_id}:sample:{number}"

    def write(folder: Path) -> None:
        backend.engine.save_sampler(model.model_id, folder)

    if wanted.kind == "inflight":
        folder = backend.catalog.put_inflight(model.model_id, sampler_id, write)
    else:
        folder = backend.catalog.ephemeral_folder(sampler_id)
        write(folder)
    session = backend.sessions.get(model.session_id)
    session.samplers[sampler_id] = Sampler(
        sampler_id, model.session_id, SavedWeights(model.base_model, folder), None
    )
    return json_reply({"type": "save_weights_for_sampler", "sampling_session_id": sampler_id})
