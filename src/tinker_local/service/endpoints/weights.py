"""Saving, listing and deleting checkpoints: the server half of `tinker/resources/weights.py`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from tinker_local.errors import NotServedError, UserInputError
from tinker_local.ops import SavedWeights
from tinker_local.service.backend import Backend, backend_of
from tinker_local.service.checkpoints import TYPES, Checkpoint, NewCheckpoint, Run
from tinker_local.service.endpoints.bodies import field, parse, promised
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
        name=wanted.path or f"{seq_id:06d}",
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
        if wanted.kind != "snapshot":
            raise NotServedError(
                f"tinker-local does not serve {wanted.kind} samplers.", "Use kind='snapshot'."
            )
        if wanted.sampling_session_seq_id is not None:
            return _ephemeral_sampler(backend, wanted.model_id, wanted.sampling_session_seq_id)
        new = NewCheckpoint(
            run_id=wanted.model_id,
            kind="sampler_weights",
            name=wanted.path or f"{seq_id:06d}",
            ttl_s=wanted.ttl_seconds,
            user_metadata=wanted.user_metadata,
        )
        saved = backend.catalog.save(
            new, lambda folder: backend.engine.save_sampler(wanted.model_id, folder)
        )
        return json_reply({"type": "save_weights_for_sampler", "path": saved.path})

    return promised(backend.promise_in_order(wanted.model_id, seq_id, work))


async def save_weights_external(request: Request) -> Response:
    """Refuse, and use up the seq_id."""
    wanted = await parse(request, types.SaveWeightsExternalRequest)

    def work() -> Reply:
        raise NotServedError(
            "tinker-local does not export external weights yet.",
            "Its checkpoints are PEFT adapters already: see the state directory's runs folder.",
        )

    return promised(backend_of(request).promise_in_order(wanted.model_id, wanted.seq_id or 0, work))


async def list_runs(request: Request) -> Response:
    backend = backend_of(request)
    runs = backend.catalog.runs()
    page, cursor = _page(request, len(runs))
    return JSONResponse(
        {"training_runs": [_run_json(backend, run) for run in runs[page]], "cursor": cursor}
    )


async def get_run(request: Request) -> Response:
    backend = backend_of(request)
    return JSONResponse(_run_json(backend, backend.catalog.run(request.path_params["run_id"])))


async def list_run_checkpoints(request: Request) -> Response:
    checkpoints = backend_of(request).catalog.of_run(request.path_params["run_id"])
    return JSONResponse({"checkpoints": [_checkpoint_json(c) for c in checkpoints]})


async def list_checkpoints(request: Request) -> Response:
    checkpoints = backend_of(request).catalog.all()
    page, cursor = _page(request, len(checkpoints))
    return JSONResponse(
        {"checkpoints": [_checkpoint_json(c) for c in checkpoints[page]], "cursor": cursor}
    )


async def delete_checkpoint(request: Request) -> Response:
    where = request.path_params
    path = f"tinker://{where['run_id']}/{where['kind']}/{where['name']}"
    backend_of(request).catalog.delete(path)
    return Response(status_code=204)


async def weights_info(request: Request) -> Response:
    """What a client must know to load a checkpoint."""
    catalog = backend_of(request).catalog
    run = catalog.run(catalog.get(await field(request, "tinker_path")).run_id)
    return JSONResponse(
        {
            "base_model": run.base_model,
            "is_lora": True,
            "lora_rank": run.lora.rank,
            "train_unembed": run.lora.train_unembed,
            "train_mlp": run.lora.train_mlp,
            "train_attn": run.lora.train_attn,
        }
    )


def _ephemeral_sampler(backend: Backend, model_id: str, number: int) -> Reply:
    model = backend.sessions.model(model_id)
    sampler_id = f"{model.session_id}:sample:{number}"
    folder = backend.catalog.ephemeral_folder(sampler_id)
    backend.engine.save_sampler(model_id, folder)
    session = backend.sessions.get(model.session_id)
    session.samplers[sampler_id] = Sampler(
        sampler_id, model.session_id, SavedWeights(model.base_model, folder), None
    )
    return json_reply({"type": "save_weights_for_sampler", "sampling_session_id": sampler_id})


def _page(request: Request, total: int) -> tuple[slice, dict[str, int]]:
    """The part of a listing that `limit` and `offset` ask for, and the cursor that says so."""
    query = request.query_params
    try:
        limit, offset = int(query.get("limit", 100)), int(query.get("offset", 0))
    except ValueError:
        raise UserInputError(f"limit or offset is no number: {query}.", "Use integers.") from None
    if limit < 1 or offset < 0:
        raise UserInputError(f"limit {limit}, offset {offset}.", "limit >= 1, offset >= 0.")
    cursor = {"limit": limit, "offset": offset, "total_count": total}
    return slice(offset, offset + limit), cursor


def _checkpoint_json(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": TYPES[checkpoint.kind],
        "time": checkpoint.created_at,
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size_bytes,
        "public": False,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": checkpoint.expires_at,
    }


def _run_json(backend: Backend, run: Run) -> dict[str, object]:
    saved = backend.catalog.of_run(run.run_id)
    newest = {
        kind: next((_checkpoint_json(c) for c in saved if c.kind == kind), None) for kind in TYPES
    }
    return {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": "local",
        "is_lora": True,
        "lora_rank": run.lora.rank,
        "last_request_time": saved[0].created_at if saved else run.created_at,
        "last_checkpoint": newest["weights"],
        "last_sampler_checkpoint": newest["sampler_weights"],
        "user_metadata": run.user_metadata,
    }
