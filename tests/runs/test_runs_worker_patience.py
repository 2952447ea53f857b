"""What a worker waits for, how often it tries again, and when it gives a run up.

A stand-in takes the method's place, since no backend fails in all these ways at will.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attempts import RUN_ID, Run, sentences, spec_of
from detached import state_events
from structlog.testing import capture_logs

from tinker_mcp.errors import (
    BackendGoneError,
    ClientLostError,
    InvalidInputError,
    RequestFailedError,
)
from tinker_mcp.runs import patience
from tinker_mcp.runs.attempt import Attempt, Outcome
from tinker_mcp.runs.journal import Journal
from tinker_mcp.runs.patience import Endeavour, RunFailedError
from tinker_mcp.settings import Settings
from tinker_mcp.store.runs import LeaseLostError, RunStore
from tinker_mcp.training.backend import BackendConnector

DONE = Outcome("completed", None, "Done.")
REFUSED = RequestFailedError("The loss is unknown.", next_step="Correct it.")
GONE = BackendGoneError("Nothing listens there.", next_step="Call check_setup.")
LOST = ClientLostError("No training client m1.", next_step="Call create_training_client.")


class Method:
    """Does in each attempt what it was given for it; the last of it again and again."""

    LOSS = "train_mean_nll"

    def __init__(self, *acts: Callable[[Attempt], Outcome] | Exception) -> None:
        self.acts = acts
        self.starts: list[int] = []

    async def train(self, attempt: Attempt) -> Outcome:
        act = self.acts[min(len(self.starts), len(self.acts) - 1)]
        self.starts.append(attempt.first_step)
        await asyncio.sleep(0)
        if isinstance(act, Exception):
            raise act
        return act(attempt)


def done(_: Attempt) -> Outcome:
    return DONE


def a_step_more_and(error: Exception) -> Callable[[Attempt], Outcome]:
    """Records the next step with a checkpoint, then fails."""

    def act(attempt: Attempt) -> Outcome:
        step = attempt.first_step + 1
        attempt.journal.step(step, {"train_mean_nll": 1.0})
        attempt.journal.checkpoint(step, f"state-{step}", f"sampler-{step}", False)
        raise error

    return act


@pytest.fixture(autouse=True)
def _no_log() -> Iterator[None]:
    """Unless it is set up, structlog shows each frame with its variables, which takes seconds."""
    with capture_logs():
        yield


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(patience, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(patience, "_DROP_AFTER_S", 0.05)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, spec_of(sentences()), sentences())


@pytest.fixture
def journal(run: Run) -> Iterator[Journal]:
    opened = run.journal()
    yield opened
    opened.close()


@pytest.fixture
def pursue(journal: Journal, runs_home: Path) -> Callable[[Method], Outcome]:
    """Pursues the run with a method, on a backend that answers."""

    def run_to_its_end(method: Method) -> Outcome:
        connector = BackendConnector(Settings(home=runs_home, backend="local"))
        endeavour = Endeavour(RUN_ID, journal, connector, method, sentences(), (), _pause_s=0.01)
        try:
            return asyncio.run(endeavour.pursue())
        finally:
            connector.close()

    return run_to_its_end


Pursue = Callable[[Method], Outcome]


def test_a_lost_client_is_opened_anew_from_the_last_checkpoint(pursue: Pursue, run: Run) -> None:
    method = Method(a_step_more_and(LOST), a_step_more_and(LOST), done)

    assert pursue(method) == DONE

    assert method.starts == [0, 1, 2]
    assert state_events(run.home, RUN_ID) == [
        *("starting", "running", "waiting No training client m1."),
        *("running", "waiting No training client m1.", "running"),
    ]


def test_a_backend_that_ended_is_waited_for(pursue: Pursue) -> None:
    method = Method(GONE, GONE, GONE, GONE, done)

    assert pursue(method) == DONE
    assert len(method.starts) == 5


def test_a_local_backend_that_each_attempt_ends_fails_the_run_at_last(pursue: Pursue) -> None:
    method = Method(GONE)

    with pytest.raises(RunFailedError, match=r"^10 times in a row: Nothing listens there\.$"):
        pursue(method)
    assert len(method.starts) == 10


def test_a_request_that_fails_three_times_at_one_step_fails_the_run(pursue: Pursue) -> None:
    method = Method(REFUSED)

    with pytest.raises(RunFailedError, match=r"^3 times in a row: The loss is unknown\.$"):
        pursue(method)
    assert method.starts == [0, 0, 0]


def test_failures_at_different_steps_fail_no_run(pursue: Pursue) -> None:
    method = Method(*[a_step_more_and(REFUSED)] * 6, done)

    assert pursue(method) == DONE
    assert method.starts == [0, 1, 2, 3, 4, 5, 6]


def test_a_lost_backend_in_between_is_no_failure(pursue: Pursue) -> None:
    assert pursue(Method(REFUSED, GONE, REFUSED, GONE, done)) == DONE


def test_what_no_attempt_can_mend_is_not_tried_again(pursue: Pursue) -> None:
    method = Method(InvalidInputError("Rank 999 is too high.", next_step="Use 128."))

    with pytest.raises(RunFailedError, match=r"^Rank 999 is too high\.$"):
        pursue(method)
    assert len(method.starts) == 1


def test_an_error_of_nobody_knows_what_is_told_by_its_name(pursue: Pursue) -> None:
    with pytest.raises(RunFailedError, match=r"^3 times in a row: KeyError: 'loss'$"):
        pursue(Method(KeyError("loss")))


def test_of_several_errors_the_lost_backend_counts(pursue: Pursue) -> None:
    several = ExceptionGroup("both", [REFUSED, ExceptionGroup("inner", [GONE])])

    assert pursue(Method(several, several, several, several, done)) == DONE


def test_a_cancelled_request_is_a_lost_client(pursue: Pursue) -> None:
    def cancel(_: Attempt) -> Outcome:
        raise asyncio.CancelledError

    assert pursue(Method(cancel, done)) == DONE


def test_a_lost_lease_ends_the_pursuit_at_once(pursue: Pursue, run: Run) -> None:
    def lose(attempt: Attempt) -> Outcome:
        with RunStore(run.home) as store:
            assert store.take(RUN_ID, "another", None, before="lease")
        attempt.journal.step(1, {"train_mean_nll": 1.0})
        return DONE

    with pytest.raises(LeaseLostError):
        pursue(Method(lose))


def test_a_stop_ends_the_waiting(pursue: Pursue, journal: Journal) -> None:
    def stop_asked_and_gone(attempt: Attempt) -> Outcome:
        attempt.journal.asked = "save"
        raise GONE

    outcome = pursue(Method(stop_asked_and_gone))

    assert (outcome.state, outcome.reason) == ("stopped", "user")
    assert outcome.detail.startswith("Stopped while it waited")


def test_a_stop_without_save_ends_an_attempt_that_is_stuck(
    pursue: Pursue, journal: Journal
) -> None:
    class Stuck(Method):
        async def train(self, attempt: Attempt) -> Outcome:
            await asyncio.Event().wait()
            return DONE

    journal.asked = "drop"

    outcome = pursue(Stuck())

    assert (outcome.state, outcome.reason) == ("stopped", "user")
    assert outcome.detail.startswith("Stopped without saving")
