"""Agents that follow the prompts: every call in them works, with the arguments that stand there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agents import TINY, Agent, in_memory
from prompt_calls import Follower

from tinker_mcp.server.prompts import workflows
from tinker_mcp.settings import Settings

PROMPTS = {workflow.name: workflow for workflow in workflows()}
NUMBER = {"type": "number", "column": "answer"}
QUESTION = [{"role": "user", "content": "Say red."}]
LENGTH = {"type": "length", "target": 6}  # a random model's answers differ in it
SMALL_RL = {"reward": LENGTH, "group_size": 4, "max_tokens": 8}
SMALL_RUN = {"steps": 2, "batch_size": 2, "rank": 4, "rl": SMALL_RL}
SMALL: dict[str, dict[str, Any]] = {"sample": {"max_tokens": 4, "num_samples": 2}}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def conversations(folder: Path, count: int = 40) -> str:
    return write(
        folder / "sft.jsonl",
        [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(count)],
    )


def sums(folder: Path) -> str:
    rows = [
        {"prompt": f"{n} + {n} =", "answer": 2 * n, "completions": [f"It is {2 * n}.", "no"]}
        for n in range(10, 26)
    ]
    return write(folder / "sums.jsonl", rows)


def follower(agent: Agent, **says: Any) -> Follower:
    return Follower(agent, {"messages": QUESTION, "base_model": TINY, **says}, SMALL)


async def test_finetune_then_compare_checkpoints(settings: Settings, tmp_path: Path) -> None:
    path = conversations(tmp_path)
    async with in_memory(settings) as agent:
        tuner = follower(agent, idempotency_key="once")
        text = PROMPTS["finetune"].told({"path": path, "base_model": TINY})
        before, keep = text.split("9. After:")
        replies = await tuner.follow(before, "stop_run", "resume_run")
        assert replies["start_run"]["held_out_source"] == "data-2"
        run = replies["get_run"]
        assert run["state"] == "completed"
        assert run["first_eval_loss"] > run["best_eval_loss"]
        newest = run["checkpoints"][-1]
        tuner.says["checkpoint"] = newest["sampler"]
        await tuner.follow(keep, "export_weights")

        judge = follower(agent, run_id=run["run_id"], completion="5!", reward=NUMBER)
        judge.says |= {"checkpoint": newest["state"], "data": sums(tmp_path)}
        judge.instead = SMALL | {
            "get_run": {"metrics": ["test/nll"]},  # those of the text are of dpo
            "forward_backward": {"data_id": "data-3"},  # finetune made two
        }
        told = {"checkpoint": newest["sampler"], "base_model": TINY, "path": path}
        compared = await judge.follow(PROMPTS["compare_checkpoints"].told(told))
    assert compared["forward_backward"]["datums"] == 40
    assert compared["test_reward"]["distribution"]["mean"] == 0.5
    assert judge.made.count("sample") == 2


async def test_design_reward_then_debug_run(settings: Settings, tmp_path: Path) -> None:
    path = sums(tmp_path)
    async with in_memory(settings) as agent:
        await agent.new_client()
        await agent.call("sample", client_id="client-1", messages=QUESTION, num_samples=8)
        designer = follower(agent, reward=NUMBER, data=path)
        designer.instead = {"sample": {"max_tokens": 4}, "start_run": SMALL_RUN}
        told = {"task": "Add.", "path": path, "base_model": TINY}
        replies = await designer.follow(PROMPTS["design_reward"].told(told))
        assert replies["test_reward"]["games"]["empty"]["as_good_as_honest"] == 0
        assert replies["forward_backward"]["step"] == 1

        said = {"run_id": designer.says["run_id"]}
        debugger = follower(agent, metrics=["env/all/correct"], query="a run that diverges", **said)
        debugger.says |= {"reward": NUMBER, "cases": [{"completion": "4", "row": {"answer": 4}}]}
        found = await debugger.follow(PROMPTS["debug_run"].told(said), "resume_run")
    assert found["get_run"]["state"] == "completed"
    assert debugger.made.count("get_run") == 5


async def test_the_cases_of_design_reward_are_judged_as_it_says(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        text = PROMPTS["design_reward"].told({"task": "Add."})
        first = text[text.index("`test_reward(") :].split("\n")[0]
        tested = (await follower(agent).follow(first))["test_reward"]
    assert [case["ok"] for case in tested["cases"]] == [True, True]


async def test_choose_method_plan_run_and_the_review_spend_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    path = conversations(tmp_path)
    told = {"goal": "Say it.", "path": path, "base_model": TINY, "method": "sft"}
    async with in_memory(settings) as agent:
        runs = (await agent.call("list_runs"))["total"]
        for name in ("choose_method", "plan_run", "review_before_spending"):
            workflow = PROMPTS[name]
            given = {a.name: told[a.name] for a in workflow.arguments if a.name in told}
            reader = follower(agent, reward=NUMBER)
            reader.instead = SMALL | {"test_reward": {"data": sums(tmp_path)}}
            await reader.follow(workflow.told(given), "wait_for_run")
            assert "start_run" not in reader.made
        assert (await agent.call("list_runs"))["total"] == runs


async def test_the_pilot_of_research_idea_can_be_planned(
    settings: Settings, tmp_path: Path
) -> None:
    async with in_memory(settings) as agent:
        thinker = follower(agent, data=sums(tmp_path), query="constant groups", reward=NUMBER)
        thinker.says |= {"cases": [{"completion": "4", "row": {"answer": 4}}]}
        thinker.only_plans = True
        text = PROMPTS["research_idea"].told({"base_model": TINY})
        await thinker.follow(text, "get_run")
    assert thinker.made.count("estimate_cost") == 2
