"""Who calls, and what was done: tokens for the SDK's identity, the key's own data, the audit log.

There are no accounts: whoever has this server's key is its one user.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Literal, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_local.errors import UserInputError
from tinker_local.service.audit import Entry, audit_of
from tinker_local.service.backend import Backend, backend_of
from tinker_local.service.identity import USER_URN, identity_of

_EventType = Literal["all", "checkpoints", "projects", "teams", "organizations"]
_RESOURCES = {
    "checkpoints": ("checkpoint_",),
    "projects": ("session_move",),
    "teams": ("team_",),
    "organizations": ("organization_",),
}


async def auth_token(request: Request) -> Response:
    """Exchange the credential, which the guard has checked, for a JWT of an hour."""
    token = identity_of(request).token(made_from=request.headers["x-api-key"])
    return JSONResponse({"jwt": token})


async def api_key(_: Request) -> Response:
    """What `tinker auth login` shows of the key."""
    return JSONResponse(
        {
            "key_id": 0,
            "name": "tinker-local",
            "note": "Valid until this server ends; `tinker-local env` prints the next one.",
            "details": {
                "org_details": {"name": "this machine"},
                "user_details": {"email": "the user of tinker-local"},
            },
        }
    )


async def audit_log(request: Request) -> Response:
    """The events of one UTC day, in the order of their time."""
    event_type = request.query_params.get("event_type", "all")
    if event_type not in get_args(_EventType):
        raise UserInputError(
            f"No event_type {event_type!r}.", f"Use one of: {', '.join(get_args(_EventType))}."
        )
    day = _day(request.query_params.get("day"))
    entries = [*audit_of(request).of_day(day), *_made_on(backend_of(request), day)]
    if event_type != "all":
        entries = [entry for entry in entries if entry.event.startswith(_RESOURCES[event_type])]
    entries.sort(key=lambda entry: entry.timestamp)
    return JSONResponse({"entries": [_entry_json(entry) for entry in entries]})


def _made_on(backend: Backend, day: date) -> list[Entry]:
    """What sessions, runs and checkpoints that are still known tell of their making."""
    made = []
    for record in backend.sessions.journal.all():
        made.append(_entry("session_create", record.created_at, session_id=record.session_id))
        if record.finish is not None:
            made.append(
                _entry(
                    "session_finish",
                    record.finish.at,
                    session_id=record.session_id,
                    reason=record.finish.reason,
                )
            )
    made += [
        _entry("training_run_create", run.created_at, training_run_id=run.run_id)
        for run in backend.catalog.runs()
    ]
    made += [
        _entry("checkpoint_create", saved.created_at, tinker_path=saved.path)
        for saved in backend.catalog.all()
    ]
    return [entry for entry in made if entry.timestamp.date() == day]


def _entry(event: str, at: str, **details: object) -> Entry:
    return Entry(datetime.fromisoformat(at).astimezone(UTC), event, details)


def _entry_json(entry: Entry) -> dict[str, object]:
    return {
        "timestamp": entry.timestamp.isoformat(),
        "event": entry.event,
        "event_details": {"user_urn": USER_URN, **entry.details},
        "tinker_path": entry.details.get("tinker_path"),
    }


def _day(text: str | None) -> date:
    try:
        return datetime.now(UTC).date() if text is None else date.fromisoformat(text)
    except ValueError:
        raise UserInputError(f"{text!r} is no day.", "Write it as 2026-01-31.") from None
