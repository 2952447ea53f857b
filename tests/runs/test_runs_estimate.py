"""What a run will cost, against cases that were computed by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from planning import arguments, conversations, workspace_on, write

from tinker_mcp.runs.planning.estimate import Speed, counted, estimate, evaluations, passes
from tinker_mcp.runs.planning.plan import checked, forecast
from tinker_mcp.runs.spec import DataFacts, RunSpec
from tinker_mcp.settings import Settings
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.loop import batch_of
from tinker_mcp.training.prices import Price, price


@pytest.fixture
async def workspace(runs_home: Path, tmp_path: Path) -> AsyncIterator[Workspace]:
    async with workspace_on(Settings(home=runs_home, roots=(tmp_path,))) as opened:
        yield opened


def facts(datums: int, tokens: int) -> DataFacts:
    return DataFacts(source="x", sha256="", datums=datums, tokens=tokens, trained_tokens=tokens)


def spec(**changed: Any) -> RunSpec:
    """1,000 datums of 512 tokens, three times, in batches of 8: 375 steps."""
    asked: dict[str, Any] = {
        "method": "sft",
        "name": "run",
        "backend": "hosted",
        "base_model": "Qwen/Qwen3-8B",
        "checkpoint": None,
        "renderer": "qwen3",
        "train_on_what": "all_assistant_messages",
        "max_length": 512,
        "train": facts(1000, 512_000),
        "held_out": None,
        "steps": 375,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "learning_rate_source": "x",
        "lr_schedule": "linear",
        "rank": 32,
        "seed": 0,
        "save_every": 75,
        "eval_every": 75,
        "ttl_s": None,
    }
    return RunSpec(**{**asked, **changed})


QWEN = [512] * 1000


def qwen_price(home: Path) -> Price:
    found = price("Qwen/Qwen3-8B", home)
    assert found is not None
    return found


def test_1000_datums_of_512_tokens_three_times_at_44_cents_a_million(tmp_path: Path) -> None:
    told = estimate(spec(), QWEN, qwen_price(tmp_path), None)
    assert told.tokens == {"train": 1_536_000, "eval": 0, "total": 1_536_000}
    assert told.usd_low == pytest.approx(0.67584)
    assert told.usd_high == pytest.approx(0.67584 + 75 * 8 * 512 * 0.44e-6)  # 75 steps again
    assert told.seconds is None


def test_the_held_out_set_is_paid_for_at_every_evaluation(tmp_path: Path) -> None:
    told = estimate(spec(held_out=facts(100, 51_200)), QWEN, qwen_price(tmp_path), None)
    assert told.tokens["eval"] == 6 * 51_200  # at 0, 75, 150, 225, 300, 375
    assert told.usd_low == pytest.approx((1_536_000 + 307_200) * 0.44e-6)  # $0.81101


def test_a_pair_is_paid_for_twice_a_step_and_once_for_its_references(tmp_path: Path) -> None:
    # 100 pairs of 2 x 300 tokens, once, in batches of 10; 10 pairs held out, scored at 0, 5 and 10
    run = spec(
        method="dpo",
        train=facts(200, 60_000),
        held_out=facts(20, 6_000),
        steps=10,
        batch_size=10,
        eval_every=5,
        save_every=5,
    )
    told = estimate(run, [600] * 100, qwen_price(tmp_path), None)
    assert told.tokens == {
        "train": 120_000,
        "eval": 18_000,
        "references": 66_000,
        "total": 204_000,
    }
    assert told.usd_low == pytest.approx(0.08976)
    assert told.usd_high == pytest.approx(0.08976 + (60_000 + 9_000) * 0.44e-6)


@pytest.mark.parametrize(
    ("steps", "eval_every", "times"), [(10, 0, 2), (10, 5, 3), (10, 4, 4), (1, 1, 2), (3, 9, 2)]
)
def test_evaluations_are_those_at_the_start_the_multiples_and_the_end(
    steps: int, eval_every: int, times: int
) -> None:
    assert evaluations(steps, eval_every) == times
    due = {0, steps} | {n for n in range(steps) if eval_every and n % eval_every == 0}
    assert len(due) == times


@pytest.mark.parametrize(("batch_size", "steps"), [(3, 1), (3, 5), (10, 2), (7, 9), (4, 25)])
def test_tokens_are_counted_as_the_batches_will_have_them(batch_size: int, steps: int) -> None:
    lengths = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    batches = [batch_of(lengths, batch_size, step, seed=4) for step in range(steps)]
    assert passes(lengths, batch_size, steps, seed=4) == sum(map(sum, batches))


def test_a_derived_price_widens_the_estimate(tmp_path: Path) -> None:
    found = price("openai/gpt-oss-20b", tmp_path)
    told = estimate(spec(save_every=375, steps=1, batch_size=1), [1_000_000], found, None)
    assert told.usd_low == pytest.approx(0.396)
    assert told.usd_high == pytest.approx(2 * 0.396 * 1.37)  # its one step twice


def test_an_unknown_price_is_not_zero() -> None:
    told = estimate(spec(), QWEN, None, None)
    assert (told.usd_low, told.usd_high, told.price) == (None, None, None)
    assert told.tokens["total"] == 1_536_000


def test_the_local_backend_costs_nothing_but_time() -> None:
    run = spec(backend="local", held_out=facts(100, 51_200))
    told = estimate(run, QWEN, None, Speed(0.001, "measured"))
    assert (told.usd_low, told.usd_high) == (0, 0)
    assert told.seconds == pytest.approx(1536 + 307.2 / 3)


def test_half_of_dpos_tokens_are_a_forward_pass_alone() -> None:
    run = spec(backend="local", method="dpo", train=facts(2, 600), steps=1, batch_size=1)
    assert counted(run, [600])["train"] == 1200
    told = estimate(run, [600], None, Speed(0.003, "measured"))
    assert told.seconds == pytest.approx(0.003 * (600 + (600 + 600) / 3))


async def test_a_forecast_measures_the_local_backend_once_and_leaves_no_client(
    workspace: Workspace, tmp_path: Path
) -> None:
    asked = arguments(write(tmp_path, conversations(40)), rank=5)
    before = await checked(workspace, asked)
    first = await forecast(workspace, asked)
    again = await forecast(workspace, asked)
    assert first is not None and again is not None
    assert before.estimate.seconds is None
    assert "estimate_cost measures it" in before.estimate.seconds_source
    assert first.estimate.seconds is not None and 0 < first.estimate.seconds < 60
    assert again.estimate.seconds == first.estimate.seconds
    assert "3 measured steps of 248 tokens" in first.estimate.seconds_source
    after = await checked(workspace, asked)
    assert after.estimate.seconds == first.estimate.seconds
    assert workspace.clients == {}
