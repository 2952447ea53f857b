"""Runs and checkpoints by name: the server half of the SDK's `RestClient`."""

from __future__ import annotations

import asyncio
import uuid

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from tinker_local.errors import UserInputError
from tinker_local.service.backend import Backend, backend_of
from tinker_local.service.checkpoint_records import checkpoint_path
from tinker_local.service.checkpoints import TYPES, Catalog, Checkpoint, Run
from tinker_local.service.endpoints.bodies import field, parse
from tinker_local.service.endpoints.paging import page

_COPIES = uuid.UUID("b6c1f0a2-5f0e-4e0c-9d53-4b1f2f6a8e11")
"""Namespace in which a copy's idempotency key becomes the id of the session that holds it."""


class TtlRequest(BaseModel):
    """PUT .../ttl, for which the SDK has no type; without a number the checkpoint stays."""

    model_config = ConfigDict(extra="forbid")

    ttl_seconds: int | None = None


async def list_runs(request: Request) -> Response:
    backend = backend_of(request)
    catalog, wanted = backend.catalog, request.query_params.get("project_id")
    runs = [
        run
        for run in catalog.runs()
        if wanted in (None, backend.sessions.project(run.run_id.partition(":")[0]))
    ]
    part, cursor = page(request, len(runs))
    return JSONResponse(
        {"training_runs": [_run_json(catalog, run) for run in runs[part]], "cursor": cursor}
    )


async def get_run(request: Request) -> Response:
    catalog = backend_of(request).catalog
    return JSONResponse(_run_json(catalog, catalog.run(request.path_params["run_id"])))


async def list_run_checkpoints(request: Request) -> Response:
    checkpoints = backend_of(request).catalog.of_run(request.path_params["run_id"])
    return JSONResponse({"checkpoints": [_checkpoint_json(c) for c in checkpoints]})


async def list_checkpoints(request: Request) -> Response:
    checkpoints = backend_of(request).catalog.all()
    part, cursor = page(request, len(checkpoints))
    return JSONResponse(
        {"checkpoints": [_checkpoint_json(c) for c in checkpoints[part]], "cursor": cursor}
    )


async def delete_checkpoint(request: Request) -> Response:
    backend_of(request).catalog.delete(path_of(request))
    return Response(status_code=204)


async def publish_checkpoint(request: Request) -> Response:
    """Mark a checkpoint public, whether it was or not.

    The SDK's documentation names 409 for one that is public already, but the SDK itself would
    repeat the request for five minutes then.
    """
    backend_of(request).catalog.set_public(path_of(request), True)
    return Response(status_code=204)


async def unpublish_checkpoint(request: Request) -> Response:
    """Mark a checkpoint private, whether it was or not."""
    backend_of(request).catalog.set_public(path_of(request), False)
    return Response(status_code=204)


async def set_checkpoint_ttl(request: Request) -> Response:
    """Shorten, extend or remove a checkpoint's time."""
    wanted = await parse(request, TtlRequest)
    backend_of(request).catalog.set_ttl(path_of(request), wanted.ttl_seconds)
    return Response(status_code=204)


async def weights_info(request: Request) -> Response:
    """What a client must know to load a checkpoint."""
    catalog = backend_of(request).catalog
    run = catalog.run(catalog.get(await field(request, "tinker_path")).run_id)
    return JSONResponse(
        {
            "base_model": run.base_model,
            "optimizer_config": {"type": "adamw"},
            "is_lora": True,
            "lora_rank": run.lora.rank,
            "train_unembed": run.lora.train_unembed,
            "train_mlp": run.lora.train_mlp,
            "train_attn": run.lora.train_attn,
        }
    )


async def copy_weights(request: Request) -> Response:
    """Give a checkpoint's files to a new run, which cannot be trained.

    The idempotency key names that run, so a copy that is asked for again finds itself.
    """
    backend = backend_of(request)
    wanted = await parse(request, types.CopyWeightsRequest)
    run_id = _copys_run_id(backend, wanted, request.headers.get("x-idempotency-key"))
    copied = await asyncio.to_thread(
        backend.catalog.copy, wanted.source_path, run_id, wanted.ttl_seconds
    )
    _remember_copy(backend, run_id, wanted.destination_project_id)
    return JSONResponse({"tinker_path": copied.path})


def _remember_copy(backend: Backend, run_id: str, project_id: str | None) -> None:
    """Note the run in its session; without one of its own, a finished one in the project."""
    session_id, journal = _session_of(run_id), backend.sessions.journal
    record = journal.get(session_id)
    if record is None:
        journal.open(session_id, {}, "copy_weights", project_id)
        journal.add_model(session_id, run_id)
        journal.finish(session_id, "success", None)
    elif run_id not in record.model_ids:
        journal.add_model(session_id, run_id)


def _session_of(run_id: str) -> str:
    return run_id.partition(":")[0]


def path_of(request: Request) -> str:
    """The tinker:// path that a request's URL speaks of."""
    where = request.path_params
    return checkpoint_path(where["run_id"], where["kind"], where["name"])


def _copys_run_id(backend: Backend, wanted: types.CopyWeightsRequest, key: str | None) -> str:
    if wanted.session_id is None:
        session_id = uuid.uuid5(_COPIES, key) if key else uuid.uuid4()
        return f"{session_id}:train:0"
    if wanted.model_seq_id is None:
        raise UserInputError(
            "copy_weights has a session_id without a model_seq_id.", "Send both, or neither."
        )
    run_id = f"{wanted.session_id}:train:{wanted.model_seq_id}"
    if run_id in backend.sessions.get(wanted.session_id).models:
        raise UserInputError(
            f"{run_id!r} is a training client.", "Copy into a model_seq_id that is not in use."
        )
    return run_id


def _checkpoint_json(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": TYPES[checkpoint.kind],
        "time": checkpoint.created_at,
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.is_public,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": checkpoint.expires_at,
    }


def _run_json(catalog: Catalog, run: Run) -> dict[str, object]:
    saved = catalog.of_run(run.run_id)
    newest = {
        kind: next((_checkpoint_json(c) for c in saved if c.kind == kind), None) for kind in TYPES
    }
    return {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": "local",
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.lora.rank,
        "last_request_time": saved[0].created_at if saved else run.created_at,
        "last_checkpoint": newest["weights"],
        "last_sampler_checkpoint": newest["sampler_weights"],
        "user_metadata": run.user_metadata,
    }
