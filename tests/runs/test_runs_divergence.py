"""When a run's losses say that it has gone wrong for good, and what is left of it then."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from attempts import Run, backend_of, held_out_sentences, sentences, spec_of
from hypothesis import given
from hypothesis import strategies as st

from servers import LocalServer
from tinker_mcp.runs.divergence import LossWatch, Verdict
from tinker_mcp.training.backend import Backend


def verdicts(*losses: float) -> list[Verdict]:
    watch = LossWatch()
    return [watch.look(loss) for loss in losses]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_has_diverged_at_once(loss: float) -> None:
    assert verdicts(loss) == ["diverged"]
    assert verdicts(2.0, loss) == ["calm", "diverged"]


def test_three_losses_above_three_times_the_lowest_mean_have_diverged() -> None:
    # The lowest mean of three is 1.0, the limit 3.0.
    assert verdicts(2, 1, 1, 1, 3.1, 3.1, 3.1) == [*["calm"] * 4, *["suspicious"] * 2, "diverged"]


def test_one_hard_batch_is_only_suspicious() -> None:
    assert verdicts(2, 1, 1, 1, 5, 1, 1) == [*["calm"] * 4, "suspicious", "calm", "calm"]


def test_a_loss_that_rises_no_higher_than_it_began_has_not_diverged() -> None:
    assert set(verdicts(2, 0.1, 0.1, 0.1, 1.9, 1.9, 1.9, 1.9)) == {"calm"}


def test_a_run_that_explodes_in_its_second_step_is_seen_to_in_its_third() -> None:
    assert verdicts(5.5, 300, 800) == ["calm", "suspicious", "diverged"]


@given(st.lists(st.floats(0.5, 1.49), max_size=30))
def test_losses_within_a_factor_of_three_never_diverge(losses: list[float]) -> None:
    assert set(verdicts(*losses)) <= {"calm"}


@given(
    before=st.lists(st.floats(0, 10), max_size=10), after=st.lists(st.floats(0, 10), max_size=10)
)
def test_a_resumed_watch_judges_as_one_that_saw_all(
    before: list[float], after: list[float]
) -> None:
    resumed = LossWatch(before)
    assert [resumed.look(loss) for loss in after] == verdicts(*before, *after)[len(before) :]


@pytest.fixture
def backend(tiny_server: LocalServer) -> Backend:
    return backend_of(tiny_server)


def a_run(home: Path, **changes: Any) -> Run:
    train = sentences()
    return Run(home, spec_of(train, **changes), train)


async def test_a_rate_that_is_far_too_high_stops_the_run_without_its_diverged_weights(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=20, save_every=1, learning_rate=10)
    outcome = await run.attempt(backend)
    losses = run.losses()
    assert (outcome.state, outcome.reason) == ("stopped", "divergence")
    assert len(losses) < 6
    assert losses[-1] > 3 * losses[0] or not math.isfinite(losses[-1])
    assert f"at step {len(losses)}." in outcome.detail
    assert run.checkpoints() == []  # already the first step's were bad
    assert "There is no checkpoint." in outcome.detail


async def test_the_last_good_checkpoint_is_kept_and_named(backend: Backend, tmp_path: Path) -> None:
    run = a_run(tmp_path, steps=3, save_every=1)
    await run.attempt(backend)
    run.change(steps=20, learning_rate=10)
    outcome = await run.attempt(backend)
    assert (outcome.state, outcome.reason) == ("stopped", "divergence")
    # Step 4 began with sound weights and left bad ones.
    assert [row.step for row in run.checkpoints()] == [1, 2, 3]
    kept = run.checkpoints()[-1].state_path
    assert f"The last good checkpoint, of step 3, is {kept}." in outcome.detail
    assert max(run.series("train", "train_mean_nll")) >= 5


async def test_a_loss_that_is_not_a_number_stops_the_run(backend: Backend, tmp_path: Path) -> None:
    # float32 overflows in the product of two adapters whose entries are about 1e30.
    run = a_run(tmp_path, steps=20, save_every=1, learning_rate=1e30)
    outcome = await run.attempt(backend)
    losses = run.losses()
    assert (outcome.state, outcome.reason) == ("stopped", "divergence")
    assert len(losses) == 1  # the second is no number, and the local backend says so
    assert "The loss diverged after step 1." in outcome.detail
    assert run.checkpoints() == []


async def test_weights_that_the_last_step_ruined_are_not_saved(
    backend: Backend, tmp_path: Path
) -> None:
    train, held_out = sentences(), held_out_sentences()
    run = Run(tmp_path, spec_of(train, held_out, steps=1, learning_rate=1e30), train, held_out)
    outcome = await run.attempt(backend)
    assert (outcome.state, outcome.reason) == ("stopped", "divergence")
    assert "it is no number at step 1." in outcome.detail
    assert math.isnan(run.series("eval", "test/nll")[1])
    assert run.checkpoints() == []


async def test_a_run_that_was_told_to_go_on_only_warns(backend: Backend, tmp_path: Path) -> None:
    run = a_run(tmp_path, steps=5, learning_rate=10, stops_on_divergence=False)
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert len(run.losses()) == 5
    assert "The loss diverged" in run.warnings()[0]
    assert [row.step for row in run.checkpoints()] == [5]
