"""Reinforcement learning as a run: what a step is, what is recorded, and how it ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rl_runs import (
    LETTERS,
    NEAR,
    REWARD,
    SHORT,
    an_rl_run,
    asked,
    rewards,
    rl_backend_of,
    transcripts,
)

from servers import LocalServer, start_server
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.policy.drift import KL_ALARM
from tinker_mcp.training.backend import Backend

V1, V2 = "optim/kl_sample_train_v1", "optim/kl_sample_train_v2"


@pytest.fixture
def backend(tiny_server: LocalServer) -> Backend:
    return rl_backend_of(tiny_server)


@pytest.fixture
def paced_backend(paced_server: LocalServer) -> Backend:
    return rl_backend_of(paced_server)


@pytest.fixture
def slow_server(tmp_path: Path) -> Iterator[LocalServer]:
    """A second a cycle: time enough to sample and score a batch in one."""
    server = start_server(tmp_path / "slow", "--cycle-s", "1.0")
    yield server
    server.stop()


def a_file(folder: Path, source: str) -> dict[str, Any]:
    """A user's reward."""
    path = folder / "reward.py"
    path.write_text(source)
    return {"type": "file", "path": str(path)}


def cycles(server: LocalServer, state_path: str) -> dict[str, int]:
    """What the clock counted for the client that saved this state."""
    answer = httpx.get(f"{server.base_url}/stats", headers={"X-API-Key": server.api_key})
    model = state_path.removeprefix("tinker://").split("/")[0]
    found: dict[str, int] = answer.json()["cycles_by_training_client"][model]
    return found


async def test_a_reward_rises(backend: Backend, tmp_path: Path) -> None:
    reward = a_file(tmp_path, LETTERS)
    run = an_rl_run(tmp_path, steps=15, group_size=8, learning_rate=3e-2, reward=reward)
    outcome = await run.attempt(backend)
    found = rewards(run)
    assert outcome.state == "completed"
    assert sum(found[:3]) / 3 < 0.3
    assert sum(found[-3:]) / 3 > 0.6


async def test_a_step_tells_what_the_cookbook_would(backend: Backend, tmp_path: Path) -> None:
    run = an_rl_run(tmp_path, steps=2)
    await run.attempt(backend)

    def first(name: str) -> float:
        return run.series("train", name)[1]

    assert first("env/all/total_episodes") == 8  # 2 groups of 4
    assert 0 < first(REWARD) < 1
    assert first("env/all/reward/std") > 0
    assert first("env/all/correct") == first(REWARD)  # each is 0 or 1
    assert first("env/all/ac_tokens_per_turn") <= 8
    assert first("env/all/stop/length") + first("env/all/stop/stop") == 1
    assert 5 < first("optim/entropy") < 6  # of 260 tokens, nearly all alike
    assert abs(first(V1)) < 1e-4  # the sampler's weights are the trainer's
    assert first(V2) < 1e-6
    assert first("off_policy_steps") == 0
    assert first("num_sequences") == 4 * (2 - first("groups/constant"))
    assert first("time/sampling") > 0


async def test_constant_groups_are_dropped_and_counted(backend: Backend, tmp_path: Path) -> None:
    ones = (
        "def reward(completion, row):\n"
        "    return 1 if row['word'] == 'red' else sum(map(ord, completion))\n"
    )
    run = an_rl_run(tmp_path, steps=2, batch_size=4, reward=a_file(tmp_path, ones))
    await run.attempt(backend)
    assert run.series("train", "groups/all") == {1: 4, 2: 4}
    assert run.series("train", "groups/constant") == {1: 1, 2: 1}
    assert run.series("train", "groups/all_one") == {1: 1, 2: 1}
    assert run.series("train", "groups/all_zero") == {1: 0, 2: 0}
    assert run.series("train", "num_sequences") == {1: 12, 2: 12}


async def test_a_step_whose_groups_are_all_constant_is_recorded_without_a_gradient(
    backend: Backend, tmp_path: Path
) -> None:
    run = an_rl_run(tmp_path, steps=3, reward=SHORT)
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert rewards(run) == [0, 0, 0]
    assert run.series("train", "groups/all_zero") == {1: 2, 2: 2, 3: 2}
    assert run.series("train", "num_sequences") == {1: 0, 2: 0, 3: 0}
    assert [row.step for row in run.checkpoints()] == [3]


async def test_with_one_step_off_policy_sampling_and_training_overlap(
    slow_server: LocalServer, tmp_path: Path
) -> None:
    a_step: dict[int, float] = {}
    for k in (0, 1):
        run = an_rl_run(
            tmp_path / str(k), steps=10, max_off_policy_steps=k, reward=NEAR, learning_rate=1e-4
        )
        await run.attempt(rl_backend_of(slow_server))
        assert min(run.series("train", "num_sequences").values()) > 0
        used = cycles(slow_server, run.checkpoints()[-1].state_path)
        a_step[k] = (used["used"] + used["wasted"]) / 10
        off = list(run.series("train", "off_policy_steps").values())
        assert off == [0] + [k] * 9
    assert a_step[0] >= 2.0  # one for the step, one for its weights
    assert a_step[1] <= a_step[0] - 0.6


async def test_substeps_are_optim_steps_of_one_batch(
    paced_backend: Backend, paced_server: LocalServer, tmp_path: Path
) -> None:
    run = an_rl_run(tmp_path, steps=3, substeps=2, group_size=8)
    await run.attempt(paced_backend)
    used = cycles(paced_server, run.checkpoints()[-1].state_path)
    assert used["steps"] == 6
    assert all(run.series("train", V2)[step] > 1e-4 for step in (1, 2, 3))  # of the second half


async def test_a_kl_penalty_holds_the_policy_near_its_start(
    backend: Backend, tmp_path: Path
) -> None:
    far: dict[float, float] = {}
    for coef in (1e-6, 1.0):
        run = an_rl_run(tmp_path / str(coef), steps=10, kl_coef=coef, group_size=8, batch_size=4)
        await run.attempt(backend)
        found = run.series("train", "kl_policy_base")
        assert abs(found[1]) < 1e-4  # it is the start
        far[coef] = found[10]
    assert far[1.0] < far[1e-6] / 2


@pytest.mark.parametrize(
    ("loss_fn", "config"),
    [
        ("importance_sampling", {}),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
        ("dro", {"beta": 0.05}),
        ("gspo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ],
)
async def test_every_loss_takes_steps(
    backend: Backend, tmp_path: Path, loss_fn: str, config: dict[str, float]
) -> None:
    run = an_rl_run(
        tmp_path, steps=2, loss_fn=loss_fn, loss_config=config, substeps=2, advantage="normalize"
    )
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert len(run.series("train", "loss")) == 2


async def test_a_sample_whose_reward_fails_is_left_out_and_told(
    backend: Backend, tmp_path: Path
) -> None:
    picky = (
        "def reward(completion, row):\n"
        "    if len(completion) % 2:\n"
        "        raise ValueError('odd')\n"
        "    return float(len(completion))\n"
    )
    run = an_rl_run(tmp_path, steps=2, group_size=8, reward=a_file(tmp_path, picky))
    outcome = await run.attempt(backend)
    errors = run.series("train", "reward/errors")
    assert outcome.state == "completed"
    assert 0 < errors[1] < 16
    assert run.series("train", "env/all/total_episodes")[1] == 16 - errors[1]
    assert any("odd" in line.get("error", "") for line in transcripts(run))


async def test_a_reward_that_always_fails_ends_the_run_with_its_words(
    backend: Backend, tmp_path: Path
) -> None:
    broken = "def reward(completion, row):\n    return row['no such column']\n"
    run = an_rl_run(tmp_path, steps=9, reward=a_file(tmp_path, broken))
    with pytest.raises(InvalidInputError, match="In 3 steps in a row no sample has a reward"):
        await run.attempt(backend)
    assert len(run.series("train", "reward/errors")) <= 2


async def test_a_run_in_two_attempts_equals_one_without_a_break(
    backend: Backend, tmp_path: Path
) -> None:
    whole = an_rl_run(tmp_path / "whole", steps=6, max_tokens=4)
    parts = an_rl_run(tmp_path / "parts", steps=3, max_tokens=4)
    await whole.attempt(backend)
    await parts.attempt(backend)
    parts.change(steps=6)
    await parts.attempt(backend)
    assert rewards(parts) == rewards(whole)
    assert parts.losses() == whole.losses()
    assert [line["step"] for line in transcripts(parts)] == [
        line["step"] for line in transcripts(whole)
    ]


async def test_held_out_prompts_are_sampled_at_the_start_every_so_often_and_at_the_end(
    backend: Backend, tmp_path: Path
) -> None:
    run = an_rl_run(tmp_path, steps=5, eval_every=2, held_out=asked(("teal", "lime")))
    await run.attempt(backend)
    found = run.series("eval", f"test/{REWARD}")
    assert list(found) == [0, 2, 4, 5]
    assert run.series("eval", "test/env/all/total_episodes")[0] == 2


async def test_transcripts_hold_the_best_the_median_and_the_worst(
    backend: Backend, tmp_path: Path
) -> None:
    run = an_rl_run(tmp_path, steps=2, reward=a_file(tmp_path, LETTERS), group_size=8)
    await run.attempt(backend)
    of_first = [line for line in transcripts(run) if line["step"] == 1]
    assert [line["rank"] for line in of_first] == [1, 9, 16]  # of 16
    values = [line["reward"] for line in of_first]
    assert values == sorted(values, reverse=True)
    assert "Say " in of_first[0]["turns"][0]["prompt"]
    assert of_first[0]["turns"][0]["tokens"] <= 8


async def test_a_policy_that_drifts_from_its_sampler_is_warned_of_once(
    backend: Backend, tmp_path: Path
) -> None:
    run = an_rl_run(tmp_path, steps=3, substeps=4, reward=NEAR, group_size=8, batch_size=4)
    await run.attempt(backend)
    assert run.series("train", V2)[1] > KL_ALARM
    told = [warning for warning in run.warnings() if "between sampler and trainer" in warning]
    assert len(told) == 1
    assert "substeps is 4" in told[0]


async def test_a_run_stops_before_its_samples_could_cost_too_much(
    backend: Backend, tmp_path: Path
) -> None:
    run = an_rl_run(
        tmp_path,
        steps=50,
        max_usd=1.0,
        usd_per_million=1000.0,
        prefill_usd_per_million=100.0,
        sample_usd_per_million=1000.0,
    )
    journal = run.journal()
    outcome = await run.attempt(backend, journal)
    assert (outcome.state, outcome.reason) == ("stopped", "budget")
    steps = len(run.losses())
    assert 1 <= steps < 10
    assert 0.5 < journal.spent_usd <= 1.0
    assert [row.step for row in run.checkpoints()] == [steps]


async def test_a_run_that_is_asked_to_stop_while_it_samples_does_so(
    backend: Backend, tmp_path: Path
) -> None:
    waits = "import time\ndef reward(completion, row):\n    time.sleep(5)\n    return 1.0\n"
    run = an_rl_run(tmp_path, steps=50, reward=a_file(tmp_path, waits))
    journal = run.journal()

    async def ask() -> None:
        await asyncio.sleep(1)
        journal.asked = "save"

    asking = asyncio.create_task(ask())
    outcome = await run.attempt(backend, journal)
    await asking
    assert (outcome.state, outcome.reason) == ("stopped", "user")


async def test_nothing_of_the_jail_is_left_in_the_environment() -> None:
    assert "TINKER_API_KEY" not in os.environ
