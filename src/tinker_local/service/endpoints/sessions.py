"""Sessions and their sampling clients: what a ServiceClient opens, and what is listed of it."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from tinker_local.errors import LocalError, UserInputError
from tinker_local.ops import BaseWeights, SamplerWeights, SavedWeights
from tinker_local.service.audit import audit_of
from tinker_local.service.backend import Backend, backend_of
from tinker_local.service.endpoints.bodies import field, parse
from tinker_local.service.endpoints.paging import page
from tinker_local.service.identity import USER_URN
from tinker_local.service.journal import FinishReason, SessionRecord, place_in_listing
from tinker_local.service.sessions import Sampler

_NAME_LIMIT = 256  # characters of a project's id or a session's display name


async def create_session(request: Request) -> Response:
    wanted = await parse(request, types.CreateSessionRequest)
    for name in ("project_id", "display_name"):
        _check_length(name, getattr(wanted, name) or "")
    session = backend_of(request).sessions.open(
        wanted.user_metadata, wanted.display_name, wanted.project_id
    )
    return JSONResponse({"type": "create_session", "session_id": session.session_id})


async def session_heartbeat(request: Request) -> Response:
    """Note that the client lives; 410, which ends its heartbeats, for a session not open here."""
    wanted = await parse(request, types.SessionHeartbeatRequest)
    try:
        backend_of(request).sessions.see(wanted.session_id)
    except LocalError as error:
        return JSONResponse({"detail": str(error)}, 410)
    return JSONResponse({"type": "session_heartbeat"})


async def finish_session(request: Request) -> Response:
    """End a session for the reason that its client gives; the first one stays."""
    backend, session_id = backend_of(request), request.path_params["session_id"]
    reason, detail = _finish_reason(await _body(request))
    backend.sessions.finish(session_id, reason, detail)
    backend.finish_session(session_id)
    return Response(status_code=204)


async def list_sessions(request: Request) -> Response:
    """Ids, newest first; those of earlier servers on this state directory too."""
    records = backend_of(request).sessions.journal.all()
    part, _ = page(request, len(records), limit=20)
    return JSONResponse({"sessions": [record.session_id for record in records[part]]})


async def get_session(request: Request) -> Response:
    record = backend_of(request).sessions.record(request.path_params["session_id"])
    return JSONResponse(
        {
            "training_run_ids": record.model_ids,
            "sampler_ids": list(record.samplers),
            "user_metadata": dict(record.user_metadata),
            "display_name": record.display_name,
        }
    )


async def search_sessions(request: Request) -> Response:
    """One page of the sessions that match, newest first."""
    backend = backend_of(request)
    wanted = await parse(request, types.SessionSearchRequest)
    found = [r for r in backend.sessions.journal.all() if _matches(backend, r, wanted)]
    if wanted.cursor is not None:
        last = (wanted.cursor.last_created_at, wanted.cursor.last_session_id)
        found = [record for record in found if place_in_listing(record) < last]
    shown = found[: wanted.limit]
    cursor = None
    if len(found) > len(shown):
        cursor = {
            "last_created_at": shown[-1].created_at,
            "last_session_id": shown[-1].session_id,
        }
    counts, sizes = _stored(backend)
    summaries = [
        {
            "session_id": record.session_id,
            "created_at": record.created_at,
            "owner": USER_URN,
            "project_id": record.project_id,
            "status": _status(backend, record),
            "checkpoints_count": counts[record.session_id],
            "display_name": record.display_name,
            "user_metadata": dict(record.user_metadata),
            "checkpoint_storage_bytes": sizes[record.session_id],
        }
        for record in shown
    ]
    return JSONResponse({"sessions": summaries, "next_cursor": cursor})


async def assign_project(request: Request) -> Response:
    """Move a session, with its runs and samplers, into a project; any name is one."""
    backend, session_id = backend_of(request), request.path_params["session_id"]
    backend.sessions.record(session_id)
    project_id = await field(request, "project_id")
    if not project_id:
        raise UserInputError("project_id is missing.", "Name the project.")
    _check_length("project_id", project_id)
    backend.sessions.journal.move(session_id, project_id)
    audit_of(request).record("session_move", session_id=session_id, project_id=project_id)
    return Response(status_code=204)


async def create_sampling_session(request: Request) -> Response:
    """Open a sampling client on a base model or a checkpoint."""
    backend = backend_of(request)
    wanted = await parse(request, types.CreateSamplingSessionRequest)
    session = backend.sessions.get(wanted.session_id)
    sampler_id = f"{wanted.session_id}:sample:{wanted.sampling_session_seq_id}"
    if sampler_id not in session.samplers:  # else it comes again, after a lost answer
        session.samplers[sampler_id] = Sampler(
            sampler_id, session.session_id, _weights(backend, wanted), wanted.model_path
        )
    return JSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler_id})


async def join_sampling_session(request: Request) -> Response:
    """Number a copy of a sampling client, so that the ids of their requests never meet."""
    wanted = await parse(request, types.JoinSamplingSessionRequest)
    number = backend_of(request).sessions.join(wanted.sampling_session_id)
    return JSONResponse({"type": "join_sampling_session", "client_counter": number})


async def get_sampler(request: Request) -> Response:
    sampler = backend_of(request).sessions.sampler(request.path_params["sampler_id"])
    return JSONResponse(
        {
            "sampler_id": sampler.sampler_id,
            "base_model": sampler.weights.base_model,
            "model_path": sampler.model_path,
        }
    )


def _weights(backend: Backend, wanted: types.CreateSamplingSessionRequest) -> SamplerWeights:
    if wanted.model_path is not None:
        checkpoint = backend.catalog.get(wanted.model_path)
        base_model = backend.catalog.run(checkpoint.run_id).base_model
        return SavedWeights(base_model, backend.catalog.folder(checkpoint))
    served = [model.name for model in backend.engine.base_models()]
    if wanted.base_model not in served:
        raise UserInputError(
            f"The base model {wanted.base_model!r} is not served here.",
            f"Use one of: {', '.join(served)}.",
        )
    return BaseWeights(wanted.base_model)


def _matches(backend: Backend, record: SessionRecord, wanted: types.SessionSearchRequest) -> bool:
    owners = getattr(wanted.owner, "owner_urns", None)
    return (
        _is_named(record, wanted.session_id, wanted.display_name)
        and (wanted.project_ids is None or record.project_id in wanted.project_ids)
        and wanted.user_metadata.items() <= record.user_metadata.items()
        and (owners is None or USER_URN in owners)
        and (
            wanted.statuses is None
            or any(_has_status(backend, record, status) for status in wanted.statuses)
        )
    )


def _is_named(record: SessionRecord, session_id: str | None, display_name: str | None) -> bool:
    """Whether one of the two filters meets it, or none was given."""
    if session_id is None and display_name is None:
        return True
    if record.session_id == session_id:
        return True
    name = (record.display_name or "").lower()
    return display_name is not None and all(word in name for word in display_name.lower().split())


def _has_status(backend: Backend, record: SessionRecord, wanted: types.SessionStatusQuery) -> bool:
    status = _status(backend, record)
    if status is None or status["type"] != wanted.type:
        return False
    reasons = getattr(wanted, "reasons", None)
    return reasons is None or status["reason"]["type"] in reasons


def _status(backend: Backend, record: SessionRecord) -> dict[str, Any] | None:
    """Active, finished, or None for one that was lost with the server that had it."""
    if record.finish is not None:
        return {
            "type": "client_finished",
            "reason": {"type": record.finish.reason},
            "detail": record.finish.detail,
        }
    return {"type": "active"} if backend.sessions.is_open(record.session_id) else None


def _stored(backend: Backend) -> tuple[Counter[str], Counter[str]]:
    """How many checkpoints, and how many bytes of them, each session has."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for checkpoint in backend.catalog.all():
        session_id = checkpoint.run_id.partition(":")[0]
        counts[session_id] += 1
        sizes[session_id] += checkpoint.size_bytes
    return counts, sizes


async def _body(request: Request) -> dict[str, Any]:
    body = await request.json() if await request.body() else {}
    return body if isinstance(body, dict) else {}


def _finish_reason(body: dict[str, Any]) -> tuple[FinishReason, str | None]:
    reason = (body.get("reason") or {}).get("type", "success")
    if reason not in get_args(FinishReason):
        raise UserInputError(
            f"A session cannot finish as {reason!r}.",
            f"Use one of: {', '.join(get_args(FinishReason))}.",
        )
    return reason, body.get("detail")


def _check_length(name: str, value: str) -> None:
    if len(value) > _NAME_LIMIT:
        raise UserInputError(f"{name} has {len(value)} characters.", f"Use at most {_NAME_LIMIT}.")
