"""What the tools tell of runs that are on disk: without a backend, and whatever the numbers are."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, in_memory
from mcp.shared.exceptions import MCPError
from mcp_types import ResourceTemplateReference

from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.showing.series import NAN_MARK
from tinker_mcp.runs.spec import DataFacts, RunSpec
from tinker_mcp.settings import Settings
from tinker_mcp.store.runs import RunStore

LEASE = "lease"
DATA = DataFacts(source="rows.jsonl", sha256="0" * 64, datums=8, tokens=800, trained_tokens=400)
SPEC = RunSpec(
    method="sft",
    name="colours",
    backend="local",
    base_model="tinker-local/tiny",
    checkpoint=None,
    renderer="role_colon",
    train_on_what="all_assistant_messages",
    max_length=512,
    train=DATA,
    held_out=DATA,
    steps=100,
    batch_size=4,
    learning_rate=1e-3,
    learning_rate_source="given",
    lr_schedule="linear",
    rank=8,
    seed=0,
    save_every=10,
    eval_every=10,
    ttl_s=None,
)
NAN = float("nan")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home of its own, without a backend."""
    return Settings(home=tmp_path / "home", roots=(tmp_path,))


@pytest.fixture
def store(settings: Settings) -> Any:
    with RunStore(settings.home) as opened:
        yield opened


def add(
    store: RunStore,
    run_id: str,
    losses: list[float],
    *,
    state: str = "running",
    reason: str | None = None,
    spec: RunSpec = SPEC,
) -> None:
    """A run of this process: alive for as long as its heartbeat is young."""
    store.add(run_id, spec.model_dump_json())
    store.take(run_id, LEASE, os.getpid(), before=None)
    store.move(run_id, LEASE, "running")
    for step, loss in enumerate(losses, 1):
        store.record(run_id, LEASE, "train", step, {"train_mean_nll": loss, "num_tokens": 100})
    if state != "running":
        store.move(run_id, LEASE, state, reason=reason)


def falling(steps: int) -> list[float]:
    return [4.0 * math.exp(-step / 20) for step in range(steps)]


async def test_runs_are_listed_newest_first_and_by_state(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", falling(100), state="completed")
    add(store, "sft-2", falling(3))
    async with in_memory(settings) as agent:
        every = await agent.call("list_runs")
        complete = await agent.call("list_runs", state="completed")
        none = await agent.call("list_runs", state="failed")
        one = await agent.call("list_runs", limit=1)
    assert [(run["run_id"], run["state"], run["step"]) for run in every["runs"]] == [
        ("sft-2", "running", 3),
        ("sft-1", "completed", 100),
    ]
    assert [run["run_id"] for run in complete["runs"]] == ["sft-1"]
    assert every["next_step"] == 'Call get_run(run_id="sft-2").'
    assert (none["runs"], none["next_step"]) == ([], "Call start_run to start one.")
    assert (len(one["runs"]), one["total"]) == (1, 2)


async def test_reading_without_a_run_makes_no_file(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        assert (await agent.call("list_runs"))["runs"] == []
        said = await agent.error("get_run", run_id="sft-1")
    assert said == "not_found: No run 'sft-1'; there is none yet. Call start_run to start one."
    assert not settings.home.exists()


async def test_an_unknown_run_names_those_there_are(settings: Settings, store: RunStore) -> None:
    add(store, "sft-1", [])
    async with in_memory(settings) as agent:
        for tool in ("get_run", "wait_for_run", "stop_run", "resume_run"):
            said = await agent.error(tool, run_id="sft-9")
            assert "No run 'sft-9'; the newest: sft-1. Call list_runs" in said


async def test_a_run_is_also_meant_by_its_name_or_the_beginning_of_its_id(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", falling(3), state="completed")
    async with in_memory(settings) as agent:
        for meant in ("colours", "sft", "sft-1"):
            for tool in ("get_run", "wait_for_run", "stop_run"):
                assert (await agent.call(tool, run_id=meant))["run_id"] == "sft-1"
        resumed = await agent.error("resume_run", run_id="colours", steps=2)
        sampled = await agent.error("sample", run_id="colours", prompt="Say")
    assert "sft-1 is complete after 3 steps" in resumed
    assert "sft-1 (completed, step 3 of 100) has no checkpoint yet" in sampled


async def test_a_name_that_several_runs_have_is_refused_with_their_ids(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", [])
    add(store, "sft-2", [])
    async with in_memory(settings) as agent:
        for tool in ("get_run", "wait_for_run", "stop_run", "resume_run"):
            said = await agent.error(tool, run_id="colours")
            assert said == "invalid_input: 2 runs fit: sft-2, sft-1. Name one by its id."
        said = await agent.error("sample", run_id="colours", prompt="Say")
    assert "2 runs fit: sft-2, sft-1" in said


async def test_a_step_that_a_run_never_comes_to_is_not_waited_for(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", falling(3))
    async with in_memory(settings) as agent:
        said = await agent.error("wait_for_run", run_id="sft-1", until="step=101")
        last = await agent.call("wait_for_run", run_id="sft-1", until="step=100", timeout_s=0)
    assert "sft-1 has 100 steps, so it never comes to step=101." in said
    assert last["finished"] is False


async def test_a_run_is_told_with_its_losses_and_what_comes_next(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", falling(40))
    for step, loss in ((0, 4.5), (10, 2.5), (20, 2.0), (30, 2.25)):
        store.record("sft-1", LEASE, "eval", step, {"test/nll": loss})
    store.record_checkpoint("sft-1", LEASE, 30, "tinker://r/weights/30", "tinker://r/s/30", False)
    store.tell("sft-1", LEASE, "warning", "Two rows were cut.")
    async with in_memory(settings) as agent:
        run = await agent.call("get_run", run_id="sft-1")
        text = agent.texts[-1]
    assert json.loads(text) == run
    assert (run["state"], run["step"], run["steps"]) == ("running", 40, 100)
    assert (run["first_eval_loss"], run["eval_loss"]) == (4.5, 2.25)
    assert (run["best_eval_loss"], run["best_eval_step"]) == (2.0, 20)
    assert run["loss"] == pytest.approx(4.0 * math.exp(-39 / 20), rel=1e-5)
    assert (run["loss_curve"][0], run["loss_curve"][-1], len(run["loss_curve"])) == ("█", "▁", 40)
    assert run["warnings"] == ["Two rows were cut."]
    assert run["checkpoints"] == [
        {
            "step": 30,
            "state": "tinker://r/weights/30",
            "sampler": "tinker://r/s/30",
            "is_final": False,
        }
    ]
    assert run["metric_names"] == ["num_tokens", "test/nll", "train_mean_nll"]
    assert [series["metric"] for series in run["series"]] == ["train_mean_nll", "test/nll"]
    assert run["next_step"] == 'Call wait_for_run(run_id="sft-1").'


async def test_a_series_is_cut_and_keeps_its_ends_and_its_lowest_point(
    settings: Settings, store: RunStore
) -> None:
    losses = falling(1000)
    losses[700] = 1e-30
    add(store, "sft-1", losses, spec=SPEC.model_copy(update={"steps": 1000}))
    async with in_memory(settings) as agent:
        most = await agent.call("get_run", run_id="sft-1", metrics=["train_mean_nll"], points=200)
        few = await agent.call("get_run", run_id="sft-1", points=10)
        none = await agent.call("get_run", run_id="sft-1", points=0)
        longest = max(map(len, agent.texts))
    (series,) = most["series"]
    assert 100 < len(series["values"]) <= 200
    assert len(series["steps"]) == len(series["values"])
    assert (series["steps"][0], series["steps"][-1], series["total"]) == (1, 1000, 1000)
    assert (series["lowest"], series["lowest_at_step"]) == (1e-30, 701)
    assert 701 in series["steps"]
    assert len(few["series"][0]["values"]) <= 10
    assert (none["series"][0]["values"], none["series"][0]["first"]) == ([], 4.0)
    assert longest < 16_000


async def test_a_loss_that_is_no_number_is_told_at_its_step(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", [4.0, 3.0, NAN, math.inf], state="stopped", reason="divergence")
    async with in_memory(settings) as agent:
        run = await agent.call("get_run", run_id="sft-1", plot=True)
        waited = await agent.call("wait_for_run", run_id="sft-1")
        listed = await agent.call("list_runs")
    assert (run["loss"], run["nan_at_step"]) == (None, 3)
    assert (waited["loss"], waited["is_finite"]) == (None, False)
    assert (listed["runs"][0]["loss"], listed["runs"][0]["is_finite"]) == (None, False)
    assert (run["series"][0]["values"], run["series"][0]["nan_at_step"]) == ([4, 3, None, None], 3)
    assert run["loss_curve"].endswith(NAN_MARK)
    assert (run["state"], run["reason"]) == ("stopped", "divergence")
    assert "start_run with a tenth of the rate" in run["next_step"]


async def test_a_metric_that_was_not_measured_names_the_others(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", [4.0])
    async with in_memory(settings) as agent:
        said = await agent.error("get_run", run_id="sft-1", metrics=["accuracy"])
    assert said == (
        "invalid_input: sft-1 has no metric accuracy. Give some of: num_tokens, train_mean_nll."
    )


@pytest.mark.parametrize("losses", [falling(2000), [], [4.0], [NAN], [-1.0, 1.0, NAN]])
async def test_the_loss_curve_is_a_small_picture(
    settings: Settings, store: RunStore, losses: list[float]
) -> None:
    from PIL import Image

    add(store, "sft-1", losses)
    store.record("sft-1", LEASE, "eval", 0, {"test/nll": 4.5})
    async with in_memory(settings) as agent:
        asked = {"run_id": "sft-1", "plot": True, "points": 200}
        reply = await agent.client.call_tool("get_run", asked)
    (picture,) = [block for block in reply.content if block.type == "image"]
    png = base64.b64decode(picture.data)
    assert picture.mime_type == "image/png"
    assert len(png) < 50_000
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.size) == ("PNG", (800, 440))
    assert reply.structured_content is not None
    assert "loss_curve" in reply.structured_content


async def test_a_long_reply_keeps_its_picture(settings: Settings, store: RunStore) -> None:
    add(store, "sft-1", falling(400))
    for number in range(10):
        store.tell("sft-1", LEASE, "warning", f"{number} " + "a long warning " * 200)
    async with in_memory(settings) as agent:
        reply = await agent.client.call_tool("get_run", {"run_id": "sft-1", "plot": True})
    assert [block.type for block in reply.content] == ["text", "image", "resource_link"]


async def test_the_log_is_shown_without_what_looks_like_a_key(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", [])
    folder = RunFolder.of(settings.home, "sft-1")
    folder.path.mkdir(parents=True)
    folder.log.write_text("one\ntwo tml-abcdefghijkl\nthree\n")
    async with in_memory(settings) as agent:
        run = await agent.call("get_run", run_id="sft-1", log_lines=2)
        silent = await agent.call("get_run", run_id="sft-1")
    assert (run["log"][0][:4], run["log"][1]) == ("two ", "three")
    assert "tml-" not in run["log"][0]
    assert silent["log"] == []


async def test_a_silent_worker_has_crashed_and_waiting_for_it_ends_at_once(
    settings: Settings, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "sft-1", [4.0, 3.0])
    later = time.time() + 11.0  # its heartbeat is older than 10 s then
    monkeypatch.setattr(time, "time", lambda: later)
    async with in_memory(settings) as agent:
        began = time.monotonic()
        run = await agent.call("wait_for_run", run_id="sft-1", timeout_s=50)
        listed = await agent.call("list_runs", state="crashed")
    assert time.monotonic() - began < 5
    assert (run["finished"], run["state"], run["step"]) == (True, "crashed", 2)
    assert 'resume_run(run_id="sft-1")' in run["next_step"]
    assert [line["run_id"] for line in listed["runs"]] == ["sft-1"]


EVENTS: dict[str, Any] = {
    "eval at step 2: test/nll 3.5": lambda store: store.record(
        "sft-1", LEASE, "eval", 2, {"test/nll": 3.5}
    ),
    "warning at step 2: W&B has no key.": lambda store: store.tell(
        "sft-1", LEASE, "warning", "W&B has no key."
    ),
    "state at step 2: waiting the backend is gone": lambda store: store.move(
        "sft-1", LEASE, "waiting", detail="the backend is gone"
    ),
}


@pytest.mark.parametrize("news", EVENTS)
async def test_waiting_ends_early_when_something_happens(
    settings: Settings, store: RunStore, news: str
) -> None:
    add(store, "sft-1", [4.0, 3.0])
    async with in_memory(settings) as agent:
        call = await waiting(agent)
        EVENTS[news](store)
        waited = await asyncio.wait_for(call, 10)
    assert waited["news"] == [news]
    assert waited["finished"] is False
    assert waited["next_step"].endswith('Call wait_for_run(run_id="sft-1").')


async def test_a_divergence_ends_the_wait_with_what_to_do(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", [4.0, NAN])
    async with in_memory(settings) as agent:
        call = await waiting(agent)
        store.move("sft-1", LEASE, "stopped", reason="divergence", detail="Loss nan at step 2.")
        waited = await asyncio.wait_for(call, 10)
    assert (waited["finished"], waited["state"]) == (True, "stopped")
    assert "divergence at step 2: Loss nan at step 2." in waited["news"]
    assert "a tenth of the rate" in waited["next_step"]


async def test_waiting_for_a_step_ends_with_it_and_tells_the_steps_before(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", [4.0])
    told: list[tuple[float, str]] = []

    begun, heard = asyncio.Event(), asyncio.Event()

    async def note(value: float, total: float | None, message: str | None) -> None:
        told.append((value, message or ""))
        {1: begun, 2: heard}.get(int(value), begun).set()

    async with in_memory(settings) as agent:
        asked = {"run_id": "sft-1", "until": "step=3", "timeout_s": 50}
        call = asyncio.create_task(
            agent.client.call_tool("wait_for_run", asked, progress_callback=note)
        )
        await asyncio.wait_for(begun.wait(), 10)
        store.record("sft-1", LEASE, "train", 2, {"train_mean_nll": 3.0})
        await asyncio.wait_for(heard.wait(), 10)
        store.record("sft-1", LEASE, "train", 3, {"train_mean_nll": 2.0})
        reply = await asyncio.wait_for(call, 10)
    assert (2, "step 2 of 100: loss 3.0000") in told
    assert reply.structured_content is not None
    assert (reply.structured_content["finished"], reply.structured_content["step"]) == (True, 3)


async def test_a_wait_that_runs_out_says_to_wait_again(settings: Settings, store: RunStore) -> None:
    add(store, "sft-1", [4.0])
    async with in_memory(settings) as agent:
        waited = await agent.call("wait_for_run", run_id="sft-1", timeout_s=0)
    assert (waited["finished"], waited["news"]) == (False, [])
    assert waited["next_step"] == 'Call wait_for_run(run_id="sft-1").'


@pytest.mark.parametrize("until", ["", "step", "step=x", "the end"])
async def test_an_end_of_waiting_that_is_unknown_is_refused(
    settings: Settings, store: RunStore, until: str
) -> None:
    add(store, "sft-1", [4.0])
    async with in_memory(settings) as agent:
        said = await agent.error("wait_for_run", run_id="sft-1", until=until)
        too_long = await agent.error("wait_for_run", run_id="sft-1", timeout_s=51)
    assert "Use completed, eval, or step=30." in said
    assert "timeout_s=51" in too_long


async def test_a_cancelled_wait_leaves_nothing_behind(settings: Settings, store: RunStore) -> None:
    add(store, "sft-1", [4.0])
    async with in_memory(settings) as agent:
        before = asyncio.all_tasks()
        call = await waiting(agent)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        left = asyncio.all_tasks() - before
        if left:
            await asyncio.wait(left, timeout=10)
        assert asyncio.all_tasks() <= before
    store.move("sft-1", LEASE, "completed")  # no reader holds the store


async def waiting(agent: Agent) -> asyncio.Task[dict[str, Any]]:
    """A call that waits for a run and has looked at it once."""
    looked = asyncio.Event()

    async def note(done: float, steps: float | None, message: str | None) -> None:
        if message and message.startswith("step "):
            looked.set()

    async def wait() -> dict[str, Any]:
        asked = {"run_id": "sft-1", "timeout_s": 50}
        reply = await agent.client.call_tool("wait_for_run", asked, progress_callback=note)
        assert reply.structured_content is not None
        return dict(reply.structured_content)

    call = asyncio.create_task(wait())
    await asyncio.wait_for(looked.wait(), 10)
    return call


async def test_runs_are_resources_and_their_ids_are_completed(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", [4.0, 3.0])
    add(store, "dpo-2", [], spec=SPEC.model_copy(update={"method": "dpo", "beta": 0.1}))
    async with in_memory(settings) as agent:
        runs = json.loads(await read(agent, "tinker-mcp://runs"))
        one = json.loads(await read(agent, "tinker-mcp://runs/sft-1"))
        with pytest.raises(MCPError, match="not_found: No run 'sft-9'"):
            await read(agent, "tinker-mcp://runs/sft-9")
        template = ResourceTemplateReference(type="ref/resource", uri="tinker-mcp://runs/{run_id}")
        found = await agent.client.complete(template, {"name": "run_id", "value": "sf"})
    assert [run["run_id"] for run in runs["runs"]] == ["dpo-2", "sft-1"]
    assert (one["run_id"], one["step"], one["loss"]) == ("sft-1", 2, 3.0)
    assert found.completion.values == ["sft-1"]


async def read(agent: Agent, uri: str) -> str:
    return str(getattr((await agent.client.read_resource(uri)).contents[0], "text", ""))


async def test_sampling_a_run_without_a_checkpoint_says_to_wait(
    settings: Settings, store: RunStore
) -> None:
    add(store, "sft-1", [4.0])
    async with in_memory(settings) as agent:
        said = await agent.error("sample", run_id="sft-1", prompt="Say")
        unknown = await agent.error("sample", run_id="sft-9", prompt="Say")
        store.record_checkpoint("sft-1", LEASE, 1, "tinker://r/weights/1", "tinker://r/s/1", False)
        both = await agent.error("sample", run_id="sft-1", base_model="m", prompt="Say")
        nothing = await agent.error("sample", prompt="Say")
    assert "sft-1 (running, step 1 of 100) has no checkpoint yet." in said
    assert 'wait_for_run(run_id="sft-1")' in said
    assert "No run 'sft-9'" in unknown
    assert "sample got run_id and base_model to sample from." in both
    assert "Give exactly one of client_id, checkpoint, run_id and base_model." in nothing


def test_reading_runs_loads_nothing_heavy_and_is_quick(settings: Settings, store: RunStore) -> None:
    for number in range(10):
        add(store, f"sft-{number}", falling(50))
    script = f"""
import json, sys, time, anyio
from pathlib import Path
from mcp.client import Client
from tinker_mcp.server import create_server
from tinker_mcp.settings import Settings

async def main():
    async with Client(create_server(Settings(home=Path({str(settings.home)!r})))) as client:
        await client.list_tools()
        took = []
        for tool, asked in (("list_runs", {{}}), ("get_run", {{"run_id": "sft-1"}})):
            began = time.perf_counter()
            reply = await client.call_tool(tool, asked)
            took.append(time.perf_counter() - began)
            assert not reply.is_error, reply
    heavy = [name for name in ("tinker", "torch", "transformers", "numpy") if name in sys.modules]
    print(json.dumps([took, heavy]))

anyio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    took, heavy = json.loads(done.stdout)
    print("list_runs, get_run: s", took)  # noqa: T201 (the measurement, with pytest -rP)
    assert heavy == []
    assert max(took) < 2.0
