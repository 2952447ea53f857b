"""The simulated clock, told the time by the test."""

from __future__ import annotations

import pytest

from tinker_local.service.clock import CycleClock, CyclesUsed, NoClock

CYCLE_S = 10.0
FORWARD_BACKWARD, OPTIM_STEP = False, True  # whether it ends a step
STEP = [FORWARD_BACKWARD, OPTIM_STEP]


class _Time:
    s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def time() -> _Time:
    return _Time()


@pytest.fixture
def clock(time: _Time) -> CycleClock:
    return CycleClock(CYCLE_S, time)


def _run(clock: CycleClock, lane: str, waiting: list[bool]) -> list[bool]:
    """Do what may be done of a lane's jobs; what is left."""
    left = list(waiting)
    while left and clock.may_run(lane):
        left.pop(0)
        clock.done(lane)
    return left


def _tick(clock: CycleClock, time: _Time, **waiting: list[bool]) -> None:
    time.s += CYCLE_S
    clock.tick(waiting)


def test_nothing_is_picked_up_before_the_first_tick(clock: CycleClock, time: _Time) -> None:
    time.s += CYCLE_S - 0.1
    clock.tick({"a": STEP})

    assert not clock.may_run("a")
    time.s += 0.1
    clock.tick({"a": STEP})
    assert clock.may_run("a")


def test_a_tick_releases_the_chunks_of_one_step_with_its_optim_step(
    clock: CycleClock, time: _Time
) -> None:
    waiting = [FORWARD_BACKWARD, FORWARD_BACKWARD, OPTIM_STEP, FORWARD_BACKWARD, OPTIM_STEP]

    _tick(clock, time, a=waiting)
    left = _run(clock, "a", waiting)

    assert left == [FORWARD_BACKWARD, OPTIM_STEP]
    clock.tick({"a": left})  # still the same cycle
    assert not clock.may_run("a")
    _tick(clock, time, a=left)
    assert _run(clock, "a", left) == []


def test_what_comes_after_the_tick_waits_for_the_next(clock: CycleClock, time: _Time) -> None:
    _tick(clock, time, a=[FORWARD_BACKWARD])
    assert _run(clock, "a", [FORWARD_BACKWARD]) == []

    time.s += CYCLE_S / 2
    clock.tick({"a": [OPTIM_STEP]})

    assert not clock.may_run("a")
    assert clock.next_tick_in_s() == pytest.approx(CYCLE_S / 2)


def test_every_training_client_has_its_step_at_a_tick(clock: CycleClock, time: _Time) -> None:
    _tick(clock, time, a=STEP * 2, b=STEP, c=[])

    assert _run(clock, "a", STEP * 2) == STEP
    assert _run(clock, "b", STEP) == []
    assert not clock.may_run("c")


def test_a_loop_that_waits_between_needs_two_cycles_a_step(clock: CycleClock, time: _Time) -> None:
    for _ in range(3):
        _tick(clock, time, a=[FORWARD_BACKWARD], b=STEP)
        _run(clock, "a", [FORWARD_BACKWARD])
        _run(clock, "b", STEP)
        _tick(clock, time, a=[OPTIM_STEP], b=STEP)
        _run(clock, "a", [OPTIM_STEP])
        _run(clock, "b", STEP)

    assert clock.cycles() == {
        "a": CyclesUsed(used=6, wasted=0, steps=3),
        "b": CyclesUsed(used=6, wasted=0, steps=6),
    }


def test_cycles_without_work_between_two_steps_are_wasted(clock: CycleClock, time: _Time) -> None:
    _tick(clock, time)
    _tick(clock, time, a=STEP)
    _run(clock, "a", STEP)
    for _ in range(3):
        _tick(clock, time, a=[])
    _tick(clock, time, a=STEP)
    _run(clock, "a", STEP)
    _tick(clock, time)

    assert clock.cycles() == {"a": CyclesUsed(used=2, wasted=3, steps=2)}
    assert clock.ticks == 7


def test_a_step_whose_jobs_take_longer_than_a_cycle_wastes_none(
    clock: CycleClock, time: _Time
) -> None:
    _tick(clock, time, a=STEP)
    for _ in range(3):
        _tick(clock, time, a=STEP)  # its forward_backward has not come to its end
    assert _run(clock, "a", STEP) == []

    _tick(clock, time, a=STEP)

    assert clock.cycles() == {"a": CyclesUsed(used=2, wasted=0, steps=2)}


def test_a_job_in_which_nobody_looks_at_the_clock_wastes_none(
    clock: CycleClock, time: _Time
) -> None:
    _tick(clock, time, a=STEP)
    time.s += 3 * CYCLE_S
    _run(clock, "a", STEP)

    _tick(clock, time, a=STEP)

    assert clock.cycles() == {"a": CyclesUsed(used=2, wasted=0, steps=2)}


def test_without_a_clock_everything_may_run_at_once() -> None:
    clock = NoClock()
    clock.tick({"a": STEP})

    assert clock.may_run("a")
    assert clock.next_tick_in_s() is None
    assert clock.cycles() == {}
