"""start_run answers in under two seconds, whatever it has to check, and starts one run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from agents import TINY, Agent, in_memory
from host_process import Hosted, start

from tinker_mcp.runs.planning import plan
from tinker_mcp.server.tools import run_starting
from tinker_mcp.settings import Settings

BOUND_S = 2.0
SPEC: dict[str, Any] = {
    "method": "sft",
    "base_model": TINY,
    "eval_share": 0.25,
    "batch_size": 4,
    "rank": 4,
    "steps": 1,
}
WRONG: dict[str, Any] = {"batch_size": 64, "learning_rate": 0.5}


def written(path: Path, count: int) -> str:
    """A file of so many conversations, no two alike."""
    lines = (
        {
            "messages": [
                {"role": "user", "content": f"What is {number} called?"},
                {"role": "assistant", "content": f"It is called {number}."},
            ]
        }
        for number in range(count)
    )
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


@dataclass
class Checks:
    """The checks of runs, each held until `go` is set; `done` says that one has ended."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    count: int = 0


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    held, real = Checks(), plan.checked

    async def checked(*asked: Any) -> plan.Planned:
        held.count += 1
        await held.go.wait()
        try:
            return await real(*asked)
        finally:
            held.done.set()

    monkeypatch.setattr(plan, "checked", checked)
    return held


@asynccontextmanager
async def impatient(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    """An agent whose calls answer at once, until the block is left: then a run is waited for."""
    patient_s = run_starting.LIMIT_S
    monkeypatch.setattr(run_starting, "LIMIT_S", 0.05)
    async with in_memory(settings) as agent:
        try:
            yield agent
        finally:
            monkeypatch.setattr(run_starting, "LIMIT_S", patient_s)


async def ended(agent: Agent, run_id: str) -> None:
    async with asyncio.timeout(120):
        while not (await agent.call("wait_for_run", run_id=run_id))["finished"]:
            pass


async def total(agent: Agent) -> int:
    return int((await agent.call("list_runs"))["total"])


async def test_a_start_that_takes_long_is_collected_by_the_same_call(
    settings: Settings, tmp_path: Path, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {**SPEC, "data": written(tmp_path / "rows.jsonl", 16), "idempotency_key": str(tmp_path)}
    async with impatient(settings, monkeypatch) as agent:
        before = await total(agent)
        early = [await agent.call("start_run", **spec) for _ in "abc"]
        checks.go.set()
        await checks.done.wait()
        assert await total(agent) == before  # nobody waits for the run: it is not begun
        started = await agent.start_run(**spec)
        repeated = await agent.start_run(**spec)
        assert await total(agent) == before + 1
        await ended(agent, started["run_id"])
    assert {(reply["finished"], reply["run_id"]) for reply in early} == {(False, None)}
    assert "nothing has been started or spent yet: call start_run again with" in str(early[0])
    assert checks.count == 1
    assert (started["is_new"], started["datums"]) == (True, 12)
    assert (repeated["is_new"], repeated["run_id"]) == (False, started["run_id"])


async def test_calls_at_the_same_time_start_one_run_and_a_later_one_another(
    settings: Settings, tmp_path: Path, checks: Checks
) -> None:
    spec = {**SPEC, "data": written(tmp_path / "rows.jsonl", 16)}
    checks.go.set()
    async with in_memory(settings) as agent:
        both = await asyncio.gather(*(agent.start_run(**spec) for _ in "ab"))
        later = await agent.start_run(**spec)
        for run in (*both, later):
            await ended(agent, run["run_id"])
    assert both[0]["run_id"] == both[1]["run_id"] != later["run_id"]
    assert checks.count == 2


async def test_what_is_found_late_is_told_in_full_by_the_call_that_collects(
    settings: Settings, tmp_path: Path, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {**SPEC, "data": written(tmp_path / "rows.jsonl", 16), **WRONG}
    async with impatient(settings, monkeypatch) as agent:
        before = await total(agent)
        early = await agent.call("start_run", **spec)
        checks.go.set()
        await checks.done.wait()
        said = await agent.refused_run(**spec)
        again = await agent.refused_run(**spec)
        assert await total(agent) == before
    assert early["finished"] is False
    assert said.startswith("invalid_input: 2 things stand in the way of this run")
    assert again == said
    assert checks.count == 2  # a failure that was told is no answer to the next call


async def test_a_file_that_was_changed_meanwhile_is_checked_anew(
    settings: Settings, tmp_path: Path, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    spec = {**SPEC, "data": written(rows, 2)}
    async with impatient(settings, monkeypatch) as agent:
        await agent.call("start_run", **spec)
        checks.go.set()
        await checks.done.wait()
        rows.write_text("{}\n")
        said = await agent.refused_run(**spec)
    assert "1 of 1 rows of data=" in said
    assert checks.count == 2


async def test_a_server_that_ends_starts_no_run_that_it_had_promised(
    settings: Settings, tmp_path: Path, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {**SPEC, "data": written(tmp_path / "rows.jsonl", 16)}
    async with impatient(settings, monkeypatch) as agent:
        before = await total(agent)
        await agent.call("start_run", **spec)
    checks.go.set()
    async with in_memory(settings) as agent:
        assert await total(agent) == before


def test_a_new_server_answers_every_start_within_two_seconds_and_starts_one_run(
    home: Path, tmp_path: Path
) -> None:
    """Its first call; 10,000 rows; as the client measures it."""
    data = written(tmp_path / "rows.jsonl", 10_000)
    server = start(home, tmp_path / "log", TINKER_MCP_ROOTS=str(tmp_path))
    before = listed(server)
    replies: list[dict[str, Any]] = []
    while not (replies and replies[-1]["finished"]):
        took_s, starved_s, reply = measured(server, {**SPEC, "data": data})
        print(f"{took_s:.2f} s, {starved_s:.2f} s of them starved")  # noqa: T201 (with pytest -rP)
        assert took_s - starved_s < BOUND_S
        replies.append(reply)
    run_id = replies[-1]["run_id"]
    after = listed(server)
    server.call("stop_run", run_id=run_id, save=False)
    server.call("wait_for_run", run_id=run_id)
    server.end("EOF")
    server.wait()
    assert len(replies) > 1
    assert {reply["run_id"] for reply in replies[:-1]} == {None}
    assert (replies[-1]["datums"], replies[-1]["held_out_datums"]) == (7500, 2500)
    assert after == [run_id, *before]


def measured(server: Hosted, spec: dict[str, Any]) -> tuple[float, float, dict[str, Any]]:
    """Seconds of a start_run, those that the server waited for a processor, and the reply."""
    began, starved_s = time.monotonic(), waited_for_a_processor(server)
    result = server.call("start_run", **spec)
    took_s = time.monotonic() - began
    assert not result.get("isError"), result
    return took_s, waited_for_a_processor(server) - starved_s, result["structuredContent"]


def waited_for_a_processor(server: Hosted) -> float:
    """Seconds that its threads were ready and others ran; 0 where the system does not say."""
    waited_ns = 0
    for thread in Path(f"/proc/{server.server.pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has ended since
            waited_ns += int(thread.read_text().split()[1])
    return waited_ns / 1e9


def listed(server: Hosted) -> list[str]:
    """The newest runs."""
    found = server.call("list_runs", limit=50)["structuredContent"]
    return [run["run_id"] for run in found["runs"]]
