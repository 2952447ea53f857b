"""What the store holds, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MetricKind = Literal["train", "eval"]
EventKind = Literal["state", "warning", "note"]
StopAsked = Literal["save", "drop"]


@dataclass(frozen=True)
class RunRow:
    """A run as it is written; see `runs.states.told` for what its state means.

    Attributes:
        spec: The RunSpec as JSON.
        reason: Why it is stopped, or None.
        detail: A sentence on its state: what failed, what it waits for.
        step: optim_steps whose metrics are recorded.
        created_at, started_at, ended_at, heartbeat_at: Seconds since 1970. `started_at` is that of
            its newest worker.
        lease: Who may write, a random word of the newest worker; None where there was none yet.
        pid: That worker's process.
        stop_asked: Whether somebody asked it to stop, and to save first.
        tokens: Submitted to be trained or scored so far, those of replayed steps too.
        usd: What these cost.
        arguments: What its start was asked for, as JSON; None where it was not kept.
    """

    run_id: str
    spec: str
    state: str
    reason: str | None
    detail: str | None
    step: int
    created_at: float
    started_at: float | None
    ended_at: float | None
    idempotency_key: str | None
    lease: str | None
    pid: int | None
    heartbeat_at: float
    stop_asked: StopAsked | None
    tokens: int
    usd: float
    arguments: str | None = None


@dataclass(frozen=True)
class MetricRow:
    """Numbers of one step: `train` of the step that led to `step`, `eval` of the weights there."""

    kind: MetricKind
    step: int
    at: float
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class CheckpointRow:
    """A saved state with the optimizer's, and sampler weights of the same step."""

    step: int
    at: float
    state_path: str
    sampler_path: str
    is_final: bool


@dataclass(frozen=True)
class EventRow:
    """Something that happened: a change of state, a warning, a note."""

    event_id: int
    at: float
    kind: EventKind
    what: str
