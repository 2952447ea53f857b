"""What was used, in the form of a bill over zero dollars: tokens by the hour, stored bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from tinker_local.errors import UserInputError
from tinker_local.service.backend import Backend, backend_of
from tinker_local.service.identity import USER_URN
from tinker_local.service.usage import Used, usage_of

_HOUR = timedelta(hours=1)
_LONGEST = timedelta(days=14)
_GIGABYTE = 10**9


@dataclass(frozen=True)
class _Event:
    """One row: `quantity` is what it is sorted by."""

    hour: datetime
    base_model: str | None
    session_id: str | None
    quantity: int
    info: dict[str, Any]
    usd_per_million_tokens: float | None


async def usage_events(request: Request) -> Response:
    """Rows of (hour, kind, base model, session) between two hours, the largest of an hour first."""
    backend = backend_of(request)
    start, end = _window(request)
    events = [_token_event(used) for used in usage_of(request).between(start, end)]
    events += _checkpoint_events(backend, start, end)
    events.sort(key=lambda event: (event.hour, -event.quantity))
    return JSONResponse(
        {
            "data": [_event_json(backend, event) for event in events],
            "sessions": _sessions(backend, events),
            "cost_data_through": None,
        }
    )


async def checkpoint_storage(request: Request) -> Response:
    """The checkpoints that exist now, by project."""
    backend = backend_of(request)
    wanted = request.query_params.get("project_id")
    counts: Counter[str | None] = Counter()
    sizes: Counter[str | None] = Counter()
    for checkpoint in backend.catalog.all():
        project_id = backend.sessions.project(checkpoint.run_id.partition(":")[0])
        counts[project_id] += 1
        sizes[project_id] += checkpoint.size_bytes
    return JSONResponse(
        {
            "effective_rate_usd_per_gigabyte_month": 0.0,
            "data": [
                {
                    "project_id": project_id,
                    "org_user_urn": USER_URN,
                    "checkpoint_count": count,
                    "size_bytes": sizes[project_id],
                    "size_gigabytes": sizes[project_id] / _GIGABYTE,
                    "estimated_monthly_cost_usd": 0.0,
                }
                for project_id, count in counts.items()
                if wanted in (None, project_id)
            ],
        }
    )


def _window(request: Request) -> tuple[datetime, datetime]:
    try:
        wanted = types.GetBillingUsageRequest.model_validate(dict(request.query_params))
    except ValidationError as error:
        wrong = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise UserInputError(
            f"The window cannot be read ({wrong}).", "Write hours as 2026-01-31T00:00:00Z."
        ) from None
    start, end = _utc(wanted.starting_on), _utc(wanted.ending_before)
    for moment in (start, end):
        if moment != moment.replace(minute=0, second=0, microsecond=0):
            raise UserInputError(f"{moment.isoformat()} is not on the hour.", "Use full hours.")
    if not timedelta(0) < end - start <= _LONGEST or start > datetime.now(UTC):
        raise UserInputError(
            f"The window {start.isoformat()} to {end.isoformat()} cannot be answered.",
            "Begin in the past and end later, at most 14 days later.",
        )
    return start, end


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _token_event(used: Used) -> _Event:
    info: dict[str, Any] = {"type": used.kind, "token_count": used.tokens}
    if used.kind.startswith("sampling_prefill"):
        info |= {"type": "sampling_prefill", "cached": used.kind.endswith("cached")}
    return _Event(used.hour, used.base_model, used.session_id, used.tokens, info, 0.0)


def _checkpoint_events(backend: Backend, start: datetime, end: datetime) -> Iterator[_Event]:
    """The checkpoints that were saved in each hour and still exist."""
    counts: defaultdict[tuple[datetime, str], int] = defaultdict(int)
    for checkpoint in backend.catalog.all():
        at = datetime.fromisoformat(checkpoint.created_at).astimezone(UTC)
        hour = at.replace(minute=0, second=0, microsecond=0)
        if start <= hour < end:
            counts[hour, checkpoint.run_id] += 1
    for (hour, run_id), count in counts.items():
        info = {"type": "checkpoint", "count": count}
        base_model = backend.catalog.run(run_id).base_model
        yield _Event(hour, base_model, run_id.partition(":")[0], 0, info, None)


def _event_json(backend: Backend, event: _Event) -> dict[str, Any]:
    return {
        "bucket_start": event.hour.isoformat(),
        "bucket_end": (event.hour + _HOUR).isoformat(),
        "base_model": event.base_model,
        "user_id": USER_URN,
        "session_id": event.session_id,
        "project_id": event.session_id and backend.sessions.project(event.session_id),
        "estimated_cost_usd": event.usd_per_million_tokens,  # of zero dollars a token
        "effective_rate_usd_per_million_tokens": event.usd_per_million_tokens,
        "event_info": event.info,
    }


def _sessions(backend: Backend, events: list[_Event]) -> dict[str, Any]:
    """The metadata of each session that is named."""
    named = {event.session_id for event in events if event.session_id is not None}
    records = {name: backend.sessions.journal.get(name) for name in sorted(named)}
    return {
        name: {"user_metadata": dict(record.user_metadata) if record else None}
        for name, record in records.items()
    }
