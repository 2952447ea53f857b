"""Runs as an agent has them: start, wait, look, sample, stop, resume; each in its own process."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from agents import TINY, Agent, in_memory

from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.server.tools import runs
from tinker_mcp.settings import Settings
from tinker_mcp.store.runs import RunStore

WORDS = [f"{first}{second}" for first in ("red", "blue", "gold", "grey") for second in "abcdefgh"]
SFT: dict[str, Any] = {
    "method": "sft",
    "base_model": TINY,
    "eval_share": 0.25,
    "batch_size": 4,
    "rank": 4,
    "learning_rate": 1e-3,
    "eval_every": 5,
    "save_every": 5,
}


@pytest.fixture
def data(tmp_path: Path) -> str:
    """32 conversations, no two alike."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(conversation(word))}\n" for word in WORDS))
    return str(rows)


def conversation(word: str) -> dict[str, Any]:
    said = [("user", f"Say {word}."), ("assistant", f"{word}!")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


async def ended(agent: Agent, run_id: str) -> dict[str, Any]:
    """Wait as an agent does, call after call."""
    async with asyncio.timeout(120):
        while True:
            waited = await agent.call("wait_for_run", run_id=run_id, timeout_s=10)
            if waited["finished"]:
                return waited


async def steps_of(agent: Agent, run_id: str) -> list[int]:
    found = await agent.call("get_run", run_id=run_id, metrics=["train_mean_nll"], points=200)
    return list(found["series"][0]["steps"])


def kill_worker(settings: Settings, run_id: str) -> None:
    with RunStore(settings.home) as store:
        pid = store.get(run_id).pid
    assert pid is not None
    worker = psutil.Process(pid)
    worker.kill()
    psutil.wait_procs([worker], timeout=5)


async def test_a_run_from_its_price_to_its_samples(settings: Settings, data: str) -> None:
    async with in_memory(settings) as agent:
        spec = {**SFT, "data": data, "steps": 20, "name": "words"}
        told = await agent.call("estimate_cost", spec=spec)
        started = await agent.start_run(**spec)
        run_id = started["run_id"]
        waited = await ended(agent, run_id)
        run = await agent.call("get_run", run_id=run_id, points=200, log_lines=5)
        again = await agent.error("resume_run", run_id=run_id)
        listed = await agent.call("list_runs", state="completed")
        sampled = await agent.call("sample", run_id=run_id, prompt="Say reda.", max_tokens=4)
    assert (told["usd_high"], told["steps"], told["backend"]) == (0.0, 20, "local")
    assert told["seconds"] > 0
    assert (started["steps"], started["datums"], started["held_out_datums"]) == (20, 24, 8)
    assert (started["tokens"], started["is_new"]) == (told["tokens"]["total"], True)
    assert started["next_step"] == f'Call wait_for_run(run_id="{run_id}").'
    assert (waited["state"], waited["step"]) == ("completed", 20)
    assert run["eval_loss"] < run["first_eval_loss"]
    assert run["series"][0]["steps"] == list(range(1, 21))
    assert run["series"][1]["steps"] == [0, 5, 10, 15, 20]
    assert [saved["step"] for saved in run["checkpoints"]] == [5, 10, 15, 20]
    assert [saved["is_final"] for saved in run["checkpoints"]] == [False, False, False, True]
    assert len(run["log"]) == 5
    assert run["folder"] == str(settings.home / "runs" / run_id)
    assert f"{run_id} is complete after 20 steps. Give steps above 20" in again
    assert run_id in [line["run_id"] for line in listed["runs"]]
    assert sampled["weights"] == f"{run_id} at step 20; the run is completed at step 20 of 20"
    assert max(map(len, agent.texts)) < 16_000


async def test_a_key_starts_one_run_however_often_it_is_given(
    settings: Settings, data: str
) -> None:
    async with in_memory(settings) as agent:
        high = {"learning_rate": 0.5, "accept": ["learning_rate"]}
        spec = {**SFT, **high, "data": data, "steps": 1, "idempotency_key": "words of today"}
        first = await agent.start_run(**spec)
        second = await agent.start_run(**spec)
        await ended(agent, first["run_id"])
        third = await agent.start_run(**spec)
        other = await agent.refused_run(**{**spec, "steps": 2, "rank": 8})
        told = await agent.call("get_run", run_id=first["run_id"])
    assert {run["run_id"] for run in (second, third)} == {first["run_id"]}
    assert [run["is_new"] for run in (first, second, third)] == [True, False, False]
    assert "nothing new was started" in third["next_step"]
    assert third["state"] == "completed"
    assert f"This idempotency_key started {first['run_id']} with other arguments: " in other
    assert "steps=1, now 2; rank=4, now 8. Use another key for another run" in other
    (warning,) = first["warnings"]
    assert warning.startswith("Accepted: learning_rate=0.5 is ")
    assert second["warnings"] == told["warnings"] == [warning]


async def test_a_run_that_is_stopped_goes_on_where_it_saved(settings: Settings, data: str) -> None:
    async with in_memory(settings) as agent:
        spec = {**SFT, "data": data, "steps": 200, "eval_every": 0, "save_every": 0}
        run_id = (await agent.start_run(**spec))["run_id"]
        stopped = await stop_at(agent, run_id, 3)
        during = await agent.call("sample", run_id=run_id, prompt="Say", max_tokens=2)
        await agent.call("resume_run", run_id=run_id, steps=stopped["step"] + 10)
        finished = await ended(agent, run_id)
        steps = await steps_of(agent, run_id)
    assert (stopped["state"], stopped["reason"]) == ("stopped", "user")
    assert 3 <= stopped["step"] < 200
    assert f"{run_id} at step {stopped['step']}; the run is stopped" in during["weights"]
    assert (finished["state"], finished["step"]) == ("completed", stopped["step"] + 10)
    assert steps == list(range(1, stopped["step"] + 11))


async def stop_at(agent: Agent, run_id: str, step: int) -> dict[str, Any]:
    async with asyncio.timeout(120):
        while True:
            asked = {"run_id": run_id, "until": f"step={step}", "timeout_s": 10}
            if (await agent.call("wait_for_run", **asked))["finished"]:
                break
    assert (await agent.call("stop_run", run_id=run_id))["state"] in ("running", "stopped")
    return await ended(agent, run_id)


async def test_a_killed_worker_is_told_within_15_s_and_the_run_can_go_on(
    settings: Settings, data: str
) -> None:
    async with in_memory(settings) as agent:
        spec = {**SFT, "data": data, "steps": 40}
        run_id = (await agent.start_run(**spec))["run_id"]
        while not (await agent.call("get_run", run_id=run_id, points=0))["checkpoints"]:
            await agent.call("wait_for_run", run_id=run_id, timeout_s=10)
        kill_worker(settings, run_id)
        killed_at = time.monotonic()
        crashed = await ended(agent, run_id)
        took_s = time.monotonic() - killed_at
        listed = await agent.call("list_runs", state="crashed")
        resumed = await agent.call("resume_run", run_id=run_id)
        finished = await ended(agent, run_id)
        steps = await steps_of(agent, run_id)
    assert (crashed["state"], took_s < 15) == ("crashed", True)
    assert f'resume_run(run_id="{run_id}")' in crashed["next_step"]
    assert [line["run_id"] for line in listed["runs"]] == [run_id]
    assert resumed["state"] in ("starting", "running")
    assert resumed["step"] == resumed["checkpoint_step"]
    assert finished["state"] == "completed"
    assert steps == list(range(1, 41))


def test_start_run_takes_what_a_run_takes() -> None:
    arguments = list(inspect.signature(runs.start_run).parameters)[1:]
    assert sorted(arguments) == sorted(RunArguments.model_fields)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stepz": 3}, "unknown argument 'stepz'; did you mean 'steps'?"),
        ({"steps": "3"}, "steps='3': Input should be a valid integer."),
        ({"method": "grpo"}, "method='grpo': Input should be 'sft', 'dpo', 'rl'"),
        ({"data": 3}, "data=3: Input should be a valid string."),
        ({"eval_share": 1.5}, "eval_share=1.5: Input should be less than 1."),
        ({"accept": ["all"]}, "accept.0='all': Input should be 'learning_rate'"),
    ],
)
async def test_what_is_no_argument_of_a_run_is_refused_by_name(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    settings = Settings(home=tmp_path / "home", roots=(tmp_path,))
    async with in_memory(settings) as agent:
        asked = {**SFT, "data": "rows.jsonl", **wrong}
        for tool, arguments in (("estimate_cost", {"spec": asked}), ("start_run", asked)):
            text = await agent.error(tool, **arguments)
            assert said in text, tool
            assert text.startswith("invalid_input: ")
    assert not settings.home.exists()


async def test_a_ttl_of_0_keeps_checkpoints_for_ever() -> None:
    from tinker_mcp.server.tools.costs import run_arguments

    asked = {"method": "sft", "data": "rows.jsonl"}
    assert run_arguments({**asked, "ttl_s": 0}).ttl_s is None
    assert run_arguments(asked).ttl_s == 7 * 24 * 3600


async def test_what_stands_in_the_way_is_told_before_anything_is_started(
    settings: Settings, data: str
) -> None:
    async with in_memory(settings) as agent:
        before = (await agent.call("list_runs"))["total"]
        said = await agent.refused_run(method="sft", base_model="no/model", data=data)
        assert (await agent.call("list_runs"))["total"] == before
    assert said.startswith("invalid_input: ")
    assert "no/model" in said
