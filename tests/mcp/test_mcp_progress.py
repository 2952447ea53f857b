"""No call is silent for longer than two seconds, and one that is cancelled can be collected."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from agents import Agent, in_memory
from mcp.client import Client
from mcp.server.mcpserver import Context, MCPServer
from pydantic import BaseModel, Field

from tinker_mcp.server import progress
from tinker_mcp.server.boundary import StrictTool, changes
from tinker_mcp.settings import Settings


class Said(BaseModel):
    next_step: str


async def silent(seconds: Annotated[float, Field(ge=0)]) -> Said:
    """Wait without a word."""
    await asyncio.sleep(seconds)
    return Said(next_step="")


async def counting(ctx: Context[Any, Any], steps: int) -> Said:
    """Report steps, with pauses."""
    for step in range(1, steps + 1):
        await asyncio.sleep(0.15)
        await ctx.report_progress(step, steps, f"step {step}")
    return Said(next_step="")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life at 50 ms and each 50 ms, so that tests need not last."""
    monkeypatch.setattr(progress, "FIRST_AFTER_S", 0.05)
    monkeypatch.setattr(progress, "EVERY_S", 0.05)


async def heard(fn: Any, folder: Path, **arguments: Any) -> list[tuple[float, Any, str]]:
    """The progress notifications of one call."""
    notes: list[tuple[float, Any, str]] = []

    async def note(value: float, total: float | None, message: str | None) -> None:
        notes.append((value, total, message or ""))

    server: MCPServer[Any] = MCPServer("t", tools=[StrictTool.of(changes(fn, "T"), folder)])
    async with Client(server) as client:
        reply = await client.call_tool(fn.__name__, arguments, progress_callback=note)
    assert not reply.is_error
    return notes


@pytest.mark.usefixtures("hasty")
async def test_a_silent_call_shows_that_it_lives(tmp_path: Path) -> None:
    notes = await heard(silent, tmp_path, seconds=0.5)
    values = [value for value, _, _ in notes]
    assert len(notes) >= 3
    assert values == sorted(set(values))
    assert max(values) < 1
    assert notes[0][2] == "silent: waiting for 0 s"


@pytest.mark.usefixtures("hasty")
async def test_signs_of_life_and_the_tools_own_steps_only_grow(tmp_path: Path) -> None:
    notes = await heard(counting, tmp_path, steps=3)
    values = [value for value, _, _ in notes]
    assert values == sorted(set(values))
    assert {1, 2, 3} <= set(values)
    assert len(values) > 3
    assert notes[-1] == (3, 3, "step 3")


async def test_a_quick_call_says_nothing(tmp_path: Path) -> None:
    assert await heard(silent, tmp_path, seconds=0) == []


async def test_a_sign_comes_after_a_second_and_each_two() -> None:
    assert (progress.FIRST_AFTER_S, progress.EVERY_S) == (1.0, 2.0)


async def test_a_cancelled_call_goes_on_and_the_same_call_collects_it(settings: Settings) -> None:
    long = [
        {
            "messages": [
                {"role": "user", "content": f"Say {number}."},
                {"role": "assistant", "content": "a word " * 200},
            ]
        }
        for number in range(64)
    ]
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data(conversations=long))["data_id"]
        client_id = await agent.new_client()
        step = {"client_id": client_id, "data_id": data_id, "optim": {"learning_rate": 1e-3}}
        call = asyncio.create_task(agent.client.call_tool("forward_backward", step))
        await asyncio.wait_for(submitted(agent, client_id), 20)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        collected = await agent.call("forward_backward", **step)
        assert (collected["finished"], collected["step"]) == (True, 1)
        assert (await agent.call("forward_backward", **step))["step"] == 2


async def submitted(agent: Agent, client_id: str) -> None:
    """Until a step of the client is on its way; a step counts from its submission on."""
    while True:
        read = await agent.client.read_resource(f"tinker-mcp://clients/{client_id}")
        if json.loads(getattr(read.contents[0], "text", ""))["step"] == 1:
            return
