"""What clients have opened: sessions, their training clients and their samplers, in memory."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tinker_local.errors import NotFoundError, UserInputError
from tinker_local.ops import LoraSpec, SamplerWeights
from tinker_local.service.scheduler import Sequencer

LOST_AFTER_S = 3600.0
"""A session without a heartbeat (sent every 10 s) for so long is finished and its memory freed."""


@dataclass
class TrainedModel:
    """A training client's server side."""

    model_id: str
    session_id: str
    base_model: str
    lora: LoraSpec
    sequencer: Sequencer
    failed_backward: str | None = None
    """Why gradients were lost since the last optim_step, if they were."""


@dataclass(frozen=True)
class Sampler:
    """A sampling client's server side."""

    sampler_id: str
    session_id: str
    weights: SamplerWeights
    model_path: str | None


@dataclass
class Session:
    """Everything one ServiceClient has opened."""

    session_id: str
    user_metadata: Mapping[str, Any]
    seen_at: float = field(default_factory=time.monotonic)
    is_finished: bool = False
    models: dict[str, TrainedModel] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)


class SessionRegistry:
    """All sessions by id."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def open(self, user_metadata: Mapping[str, Any] | None) -> Session:
        session = Session(str(uuid.uuid4()), user_metadata or {})
        self._sessions[session.session_id] = session
        return session

    def all(self) -> list[Session]:
        return list(self._sessions.values())

    def get(self, session_id: str) -> Session:
        """An open session.

        Raises:
            NotFoundError: This server never had it, most often because it was restarted.
            UserInputError: It was finished.
        """
        session = self._known(session_id)
        if session.is_finished:
            raise UserInputError(
                f"The session {session_id!r} is finished.", "Make a new ServiceClient."
            )
        return session

    def finish(self, session_id: str) -> Session:
        """Close a session to further requests; one that is finished stays so.

        Raises:
            NotFoundError: This server never had it.
        """
        session = self._known(session_id)
        session.is_finished = True
        return session

    def model(self, model_id: str) -> TrainedModel:
        """A training client of an open session.

        Raises:
            NotFoundError: It, or its session, is not here.
            UserInputError: Its session was finished.
        """
        session = self.get(model_id.partition(":")[0])
        if model_id not in session.models:
            raise NotFoundError(
                f"No training client {model_id!r} in its session.",
                "Create one with create_lora_training_client or from a saved state.",
            )
        return session.models[model_id]

    def sampler(self, sampler_id: str) -> Sampler:
        """A sampling client of an open session; raises as `model` does."""
        session = self.get(sampler_id.partition(":")[0])
        if sampler_id not in session.samplers:
            raise NotFoundError(
                f"No sampling client {sampler_id!r} in its session.",
                "Create one with create_sampling_client.",
            )
        return session.samplers[sampler_id]

    def lost(self) -> list[Session]:
        """Open sessions whose client has gone silent."""
        limit = time.monotonic() - LOST_AFTER_S
        return [s for s in self._sessions.values() if not s.is_finished and s.seen_at < limit]

    def _known(self, session_id: str) -> Session:
        if session_id not in self._sessions:
            raise NotFoundError(
                f"No session {session_id!r} here: this server has been restarted since.",
                "Make a new ServiceClient, and training clients from their last saved state.",
            )
        return self._sessions[session_id]
