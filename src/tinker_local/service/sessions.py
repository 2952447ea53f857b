"""What clients have opened: sessions, their training clients and their samplers.

What they work with lies in memory and goes with the server; which there were is kept by the
journal, so that a request for one of them can be told what became of it.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tinker_local.errors import NotFoundError, UserInputError
from tinker_local.ops import LoraSpec, SamplerWeights
from tinker_local.service.journal import (
    FinishReason,
    RecordedSampler,
    SessionJournal,
    SessionRecord,
)
from tinker_local.service.scheduler import Sequencer

LOST_AFTER_S = 3600.0
"""A session without a heartbeat (sent every 10 s) for so long is finished and its memory freed."""

ValueT = TypeVar("ValueT")


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

    def note_gap(self, seq_id: int) -> None:
        """A request never came; it may have been part of a forward_backward."""
        self.failed_backward = f"request {seq_id} of this client never reached the server"


@dataclass(frozen=True)
class Sampler:
    """A sampling client's server side."""

    sampler_id: str
    session_id: str
    weights: SamplerWeights
    model_path: str | None


class _Noted(dict[str, ValueT]):
    """Tells of each value that is put in."""

    def __init__(self, note: Callable[[ValueT], None] = lambda _: None) -> None:
        super().__init__()
        self._note = note

    def __setitem__(self, key: str, value: ValueT) -> None:
        super().__setitem__(key, value)
        self._note(value)


@dataclass
class Session:
    """Everything one ServiceClient has opened."""

    session_id: str
    user_metadata: Mapping[str, Any]
    seen_at: float = field(default_factory=time.monotonic)
    is_finished: bool = False
    models: dict[str, TrainedModel] = field(default_factory=_Noted)
    samplers: dict[str, Sampler] = field(default_factory=_Noted)
    joined: Counter[str] = field(default_factory=Counter)
    """How many copies of a sampling client have asked for a number of their own, by sampler."""


class SessionRegistry:
    """All sessions by id.

    Args:
        journal: Where they are remembered; by default in memory alone.
        newest_state: The tinker:// path of a run's newest saved state, None if it has none.
        lost_after_s: Seconds of silence after which a session counts as lost.
    """

    def __init__(
        self,
        journal: SessionJournal | None = None,
        newest_state: Callable[[str], str | None] = lambda _: None,
        lost_after_s: float = LOST_AFTER_S,
    ) -> None:
        self.journal = journal or SessionJournal()
        self._newest_state = newest_state
        self._lost_after_s = lost_after_s
        self._sessions: dict[str, Session] = {}

    def open(
        self,
        user_metadata: Mapping[str, Any] | None,
        display_name: str | None = None,
        project_id: str | None = None,
    ) -> Session:
        session_id = str(uuid.uuid4())
        metadata = user_metadata or {}
        texts = {key: str(value) for key, value in metadata.items()}
        self.journal.open(session_id, texts, display_name, project_id)
        session = Session(
            session_id,
            metadata,
            models=_Noted(lambda model: self.journal.add_model(session_id, model.model_id)),
            samplers=_Noted(self._note_sampler),
        )
        self._sessions[session_id] = session
        return session

    def all(self) -> list[Session]:
        """Those opened since the server was started."""
        return list(self._sessions.values())

    def get(self, session_id: str) -> Session:
        """An open session.

        Raises:
            NotFoundError: There never was one, or it was lost when the server was restarted.
            UserInputError: It was finished.
        """
        session = self._known(session_id)
        if session.is_finished:
            raise UserInputError(
                f"The session {session_id!r} is finished.", "Make a new ServiceClient."
            )
        return session

    def record(self, session_id: str) -> SessionRecord:
        """What is remembered of a session, be it open or long gone.

        Raises:
            NotFoundError: There never was one.
        """
        record = self.journal.get(session_id)
        if record is None:
            raise _never(session_id)
        return record

    def is_open(self, session_id: str) -> bool:
        session = self._sessions.get(session_id)
        return session is not None and not session.is_finished

    def project(self, session_id: str) -> str | None:
        """The project that a session, and with it what it made, belongs to now."""
        record = self.journal.get(session_id)
        return None if record is None else record.project_id

    def see(self, session_id: str) -> None:
        """Note that an open session's client lives; raises as `get` does."""
        self.get(session_id).seen_at = time.monotonic()
        self.journal.see(session_id)

    def finish(
        self, session_id: str, reason: FinishReason = "interrupted", detail: str | None = None
    ) -> Session:
        """Close a session to further requests; the first reason stays.

        Raises:
            NotFoundError: There never was one, or it was lost when the server was restarted.
        """
        session = self._known(session_id)
        if not session.is_finished:
            session.is_finished = True
            self.journal.finish(session_id, reason, detail)
        return session

    def model(self, model_id: str) -> TrainedModel:
        """A training client of an open session.

        Raises:
            NotFoundError: It, or its session, is not here.
            UserInputError: Its session was finished.
        """
        session_id = model_id.partition(":")[0]
        if session_id not in self._sessions:
            self._check_lost_model(model_id)
        session = self.get(session_id)
        if model_id not in session.models:
            raise NotFoundError(
                f"No training client {model_id!r} in its session.",
                "Create one with create_lora_training_client or from a saved state.",
            )
        return session.models[model_id]

    def sampler(self, sampler_id: str) -> Sampler:
        """A sampling client of an open session; raises as `model` does."""
        session_id = sampler_id.partition(":")[0]
        if session_id not in self._sessions:
            self._check_lost_sampler(sampler_id)
        session = self.get(session_id)
        if sampler_id not in session.samplers:
            raise NotFoundError(
                f"No sampling client {sampler_id!r} in its session.",
                "Create one with create_sampling_client.",
            )
        return session.samplers[sampler_id]

    def join(self, sampler_id: str) -> int:
        """A number for one more copy of a sampling client, 1, 2, 3 ...; raises as `model` does."""
        sampler = self.sampler(sampler_id)
        joined = self._sessions[sampler.session_id].joined
        joined[sampler_id] += 1
        return joined[sampler_id]

    def lost(self) -> list[Session]:
        """Open sessions whose client has gone silent."""
        limit = time.monotonic() - self._lost_after_s
        return [s for s in self._sessions.values() if not s.is_finished and s.seen_at < limit]

    def _note_sampler(self, sampler: Sampler) -> None:
        recorded = RecordedSampler(sampler.weights.base_model, sampler.model_path)
        self.journal.add_sampler(sampler.session_id, sampler.sampler_id, recorded)

    def _known(self, session_id: str) -> Session:
        if session_id in self._sessions:
            return self._sessions[session_id]
        record = self.record(session_id)
        if record.finish is not None:
            raise UserInputError(
                f"The session {session_id!r} is finished.", "Make a new ServiceClient."
            )
        raise NotFoundError(
            f"The session {session_id!r} was lost when this server was restarted.",
            "Make a new ServiceClient, and training clients from their last saved state.",
        )

    def _check_lost_model(self, model_id: str) -> None:
        """Raise for a training client of an earlier server, which states or the journal tell of."""
        record = self.journal.get(model_id.partition(":")[0])
        if record is not None and record.finish is not None:
            return  # it was not lost: its session had ended
        state = self._newest_state(model_id)
        lost = f"The training client {model_id!r} was lost when this server was restarted."
        if state is not None:
            raise NotFoundError(
                lost,
                "Make a new ServiceClient and go on from its last saved state: "
                f"create_training_client_from_state_with_optimizer({state!r}).",
            )
        if record is not None and model_id in record.model_ids:
            raise NotFoundError(
                f"{lost} No state of it was saved.",
                "Make a new ServiceClient and start it anew, with save_state now and then.",
            )

    def _check_lost_sampler(self, sampler_id: str) -> None:
        """Raise for a sampling client of an earlier server, which the journal tells of."""
        record = self.journal.get(sampler_id.partition(":")[0])
        if record is not None and record.finish is None and sampler_id in record.samplers:
            raise _lost_sampler(sampler_id, record.samplers[sampler_id])


def _lost_sampler(sampler_id: str, sampler: RecordedSampler) -> NotFoundError:
    if sampler.model_path is not None:
        again = f"create_sampling_client(model_path={sampler.model_path!r})"
    else:
        again = (
            f"create_sampling_client(base_model={sampler.base_model!r}), or sampler weights from "
            "its training client, if it sampled from trained weights without a name"
        )
    return NotFoundError(
        f"The sampling client {sampler_id!r} was lost when this server was restarted.",
        f"Make a new ServiceClient and {again}.",
    )


def _never(session_id: str) -> NotFoundError:
    return NotFoundError(
        f"There never was a session {session_id!r} on this server.",
        "Make a new ServiceClient. If another tinker-local had it, start that one's --state-dir.",
    )
