"""Runs as they are shown, from a store that is written by hand."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_runs import StoredRun

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.showing.series import Point, Series, cut, series, sparkline
from tinker_mcp.runs.showing.views import RunSummary, Until, Watcher, changes, moment, summary, tail
from tinker_mcp.store.rows import MetricRow
from tinker_mcp.store.runs import RunStore


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    return StoredRun(tmp_path)


def seen(run: StoredRun, after_s: float = 0.0) -> RunSummary:
    with RunStore(run.home) as store:
        return summary(store, store.get(run.run_id), time.time() + after_s)


def of(*values: float) -> Series:
    rows = [MetricRow("train", step, 0.0, {"loss": v}) for step, v in enumerate(values, 1)]
    return series(rows, "loss", 200)


def test_a_new_run_has_nothing_to_show_but_itself(run: StoredRun) -> None:
    got = seen(run)
    assert (got.run_id, got.name, got.method, got.state) == ("sft-1", "colours", "sft", "running")
    assert (got.step, got.steps, got.loss, got.eval) == (0, 100, None, None)
    assert (got.tokens_per_s, got.seconds_left, got.checkpoints) == (None, None, ())


def test_a_summary_tells_loss_evaluations_checkpoints_and_warnings(run: StoredRun) -> None:
    run.evaluate(0, 3.0)
    run.train(3.0, 2.0, 1.5)
    run.evaluate(2, 1.8)
    run.evaluate(3, 2.2)
    run.checkpoint(2)
    run.warn("9 of 10 examples were cut.")
    run.warn("9 of 10 examples were cut.")
    got = seen(run)
    assert (got.step, got.loss) == (3, 1.5)
    assert got.eval is not None
    assert (got.eval.first, got.eval.last) == (Point(0, 3.0), Point(3, 2.2))
    assert got.eval.best == Point(2, 1.8)
    assert [row.step for row in got.checkpoints] == [2]
    assert got.warnings == ("9 of 10 examples were cut.",)


def test_the_pace_of_the_last_steps_tells_what_is_left(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for step in (1, 2, 3):  # two seconds and 20 tokens a step
        monkeypatch.setattr(time, "time", lambda step=step: now + 2.0 * step)
        run.train(1.0, first=step)
    got = seen(run)
    assert got.tokens_per_s == pytest.approx(10.0)
    assert got.seconds_left == pytest.approx(97 * 2.0)


def test_a_run_without_a_sign_of_life_is_told_as_crashed(run: StoredRun) -> None:
    run.train(1.0, 0.9)
    assert seen(run, after_s=9.0).state == "running"
    got = seen(run, after_s=11.0)
    assert (got.state, got.step, got.seconds_left) == ("crashed", 2, None)


def test_an_ended_run_stays_what_it_is(run: StoredRun) -> None:
    run.move("stopped", "budget", "$2.00 are spent.")
    got = seen(run, after_s=1e6)
    assert (got.state, got.reason, got.detail) == ("stopped", "budget", "$2.00 are spent.")


def test_a_loss_that_is_no_number_is_none(run: StoredRun) -> None:
    run.train(1.0, math.nan)
    assert seen(run).loss is None


def test_dpo_is_shown_by_its_own_loss(tmp_path: Path) -> None:
    run = StoredRun(tmp_path, "dpo-1", method="dpo", beta=0.1)
    run.train(0.69, 0.5)
    assert (seen(run).loss_metric, seen(run).loss) == ("dpo_loss", 0.5)


def test_a_short_series_is_whole() -> None:
    got = of(3.0, 1.0, 2.0)
    assert [(p.step, p.value) for p in got.points] == [(1, 3.0), (2, 1.0), (3, 2.0)]
    assert (got.first, got.last, got.lowest) == (Point(1, 3.0), Point(3, 2.0), Point(2, 1.0))


def test_a_long_series_keeps_ends_and_extremes() -> None:
    known = [Point(step, math.sin(step / 50.0)) for step in range(5000)]
    known[1234], known[2345] = Point(1234, -9.0), Point(2345, 9.0)
    for points in (5, 20, 200):
        kept = cut(known, points)
        assert len(kept) <= points
        assert kept == sorted(kept, key=lambda point: point.step)
        assert {known[0], known[-1], known[1234], known[2345]} <= set(kept)


def test_a_spike_of_each_part_survives_the_cut() -> None:
    known = [Point(step, 5.0 if step % 500 == 250 else 1.0) for step in range(5000)]
    spikes = [point for point in cut(known, 50) if point.value == 5.0]
    assert len(spikes) == 10


def test_a_series_has_never_more_than_200_points() -> None:
    rows = [MetricRow("train", step, 0.0, {"loss": 1.0 / step}) for step in range(1, 1000)]
    assert 190 <= len(series(rows, "loss", 10_000).points) <= 200
    assert len(series(rows, "loss", 7).points) <= 7
    assert series(rows, "loss", 7).total == 999


def test_the_slope_is_that_of_the_last_half_per_100_steps() -> None:
    falling_then_rising = [float(10 - n) for n in range(10)] + [0.5 * n for n in range(10)]
    assert of(*falling_then_rising).slope_per_100_steps == pytest.approx(50.0)
    assert of(1.0).slope_per_100_steps is None


def test_nan_is_told_by_its_first_step_and_is_no_point() -> None:
    got = of(2.0, 1.0, math.nan, 3.0, math.inf)
    assert got.nan_at_step == 3
    assert got.lowest == Point(2, 1.0)
    assert got.last == Point(5, None)


def test_a_nan_survives_the_cut() -> None:
    known = [Point(step, 1.0) for step in range(5000)]
    known[777] = Point(777, None)
    assert known[777] in cut(known, 20)


@given(
    values=st.lists(st.one_of(st.none(), st.floats(-1e300, 1e300)), max_size=300),
    points=st.integers(0, 60),
)
def test_a_cut_is_short_in_order_and_keeps_what_there_is_room_for(
    values: list[float | None], points: int
) -> None:
    known = [Point(step, value) for step, value in enumerate(values)]
    kept = cut(known, points)
    assert len(kept) <= points
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    if known and points >= 5:
        numbers = [value for value in values if value is not None]
        assert {known[0], known[-1]} <= set(kept)
        assert {min(numbers, default=None), max(numbers, default=None)} <= {
            *(point.value for point in kept),
            *([] if numbers else [None]),
        }
        assert None not in values or any(point.value is None for point in kept)
    assert len(sparkline(values, points)) == min(points, len(values))


def test_a_metric_that_was_never_measured_is_empty() -> None:
    assert series([], "loss") == Series("loss", (), 0, None, None, None, None, None)


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, 6, 5, 4, 3, 2, 1, 0], 4, "█▆▃▁"),
        ([1.0, 1.0, 1.0], 10, "▁▁▁"),
        ([0.0, math.nan, None, 1.0], 4, "▁!!█"),
        ([None, None], 2, "!!"),
        ([], 10, ""),
    ],
)
def test_a_sparkline(values: list[float | None], width: int, drawn: str) -> None:
    assert sparkline(values, width) == drawn


def test_one_nan_in_a_cell_of_many_is_marked() -> None:
    assert sparkline([1.0] * 50 + [None] + [1.0] * 49, 10) == "▁▁▁▁▁!▁▁▁▁"


def test_changes_are_told_once(run: StoredRun) -> None:
    with RunStore(run.home) as store:
        watcher = Watcher(store, store.get("sft-1"))
        assert watcher.look(store.get("sft-1")) == []
        run.train(1.0, 0.9)
        assert watcher.look(store.get("sft-1")) == []  # a step alone is no news
        run.evaluate(2, 1.25)
        run.warn("The log's disk is full.")
        news = watcher.look(store.get("sft-1"))
        assert [(change.kind, change.step, change.what) for change in news] == [
            ("eval", 2, "test/nll 1.25"),
            ("warning", 2, "The log's disk is full."),
        ]
        assert watcher.look(store.get("sft-1")) == []


def test_a_wait_for_the_backend_and_its_end_are_both_told(run: StoredRun) -> None:
    with RunStore(run.home) as store:
        began = moment(store, store.get("sft-1"))
        run.move("waiting", detail="the backend does not answer")
        run.move("running")
        news = changes(store, store.get("sft-1"), began)
    assert [change.what for change in news] == ["waiting the backend does not answer", "running"]


def test_a_crash_is_a_change_though_nobody_wrote_it(run: StoredRun) -> None:
    with RunStore(run.home) as store:
        began = moment(store, store.get("sft-1"))
        news = changes(store, store.get("sft-1"), began, time.time() + 11.0)
    assert [(change.kind, change.what) for change in news] == [("state", "crashed")]


def test_a_divergence_is_told_as_one(run: StoredRun) -> None:
    run.train(1.0, math.nan)
    with RunStore(run.home) as store:
        began = moment(store, store.get("sft-1"))
        run.move("stopped", "divergence", "The loss of step 2 is NaN.")
        news = changes(store, store.get("sft-1"), began)
    assert [change.kind for change in news] == ["state", "divergence"]
    assert news[1].what == "The loss of step 2 is NaN."


def test_an_evaluation_that_came_again_after_a_resume_is_news(run: StoredRun) -> None:
    run.evaluate(5, 1.0)
    with RunStore(run.home) as store:
        began = moment(store, store.get("sft-1"))
        run.evaluate(5, 1.0)
        assert [c.kind for c in changes(store, store.get("sft-1"), began)] == ["eval"]


@pytest.mark.parametrize(
    ("text", "until"),
    [("completed", Until("completed")), ("eval", Until("eval")), ("step=30", Until("step", 30))],
)
def test_what_can_be_waited_for(text: str, until: Until) -> None:
    assert Until.parse(text) == until


@pytest.mark.parametrize("text", ["", "done", "step", "step=", "step=-1", "step=x", "eval=3"])
def test_what_cannot_be_waited_for_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="completed, eval, or step=30"):
        Until.parse(text)


def test_any_end_ends_a_wait() -> None:
    assert Until("step", 30).is_met("crashed", 4, [])
    assert Until("step", 30).is_met("running", 30, [])
    assert not Until("step", 30).is_met("running", 29, [])
    assert not Until("completed").is_met("waiting", 100, [])


def test_the_tail_of_a_log_is_without_secrets(tmp_path: Path) -> None:
    log = tmp_path / "logs.log"
    secrets = {
        "tml-abcdefgh12345": "key tml-abcdefgh12345 refused",
        "hunter2pass": "GET https://me:hunter2pass@example.org/x",
        "abc.DEF-123456": "Authorization: Bearer abc.DEF-123456",
        "s3cr3t-value": "TINKER_API_KEY=s3cr3t-value",
        "0123456789abcdef0123456789abcdef01234567": (
            "wandb 0123456789abcdef0123456789abcdef01234567"
        ),
        "given-by-hand": "something given-by-hand in between",
    }
    log.write_text("".join(f"{line}\n" for line in ["first", *secrets.values(), "last"]))
    shown = tail(log, 7, ["given-by-hand"])
    assert len(shown) == 7
    assert shown[-1] == "last"
    assert not any(secret in line for secret in secrets for line in shown)
    assert shown[3] == "TINKER_API_KEY=[hidden]"


def test_a_log_that_does_not_exist_has_no_lines(tmp_path: Path) -> None:
    assert tail(tmp_path / "logs.log", 5) == []


def test_the_tail_of_a_long_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "logs.log"
    log.write_text("".join(f"line {n}\n" for n in range(100_000)))
    assert tail(log, 2) == ["line 99998", "line 99999"]
    assert tail(log, 0) == []
