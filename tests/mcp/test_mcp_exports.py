"""Weights as folders: loaded, compared, and there whole or not at all."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from agents import Agent, in_memory

from servers import LocalServer
from tinker_mcp.settings import Settings
from tinker_mcp.training.export_worker import _workshop

EXACT = 1e-3  # nats; both sides compute in float32
BOUND_S = 240.0  # an export takes 8 s; on a busy machine many times that


async def trained(agent: Agent, **arguments: Any) -> dict[str, Any]:
    """What save_checkpoint says of a client after a few large steps."""
    data_id = (await agent.new_data())["data_id"]
    client_id = await agent.new_client(**arguments)
    await agent.train(client_id, data_id, steps=4)
    return await agent.call("save_checkpoint", client_id=client_id, name="end")


async def exported(agent: Agent, checkpoint: str, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Collect an export, however many calls it takes."""
    asked = {"checkpoint": checkpoint, "output_dir": str(folder), **arguments}
    async with asyncio.timeout(BOUND_S):
        while not (reply := await agent.call("export_weights", **asked))["finished"]:
            assert "call export_weights again" in reply["next_step"]
    return reply


def workers() -> list[psutil.Process]:
    """The export processes below this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "tinker_mcp.training.export_worker" in child.cmdline()]


@pytest.fixture(autouse=True)
def _no_worker_left() -> Iterator[None]:
    yield
    _, alive = psutil.wait_procs(workers(), timeout=10)
    assert alive == []


async def test_a_state_becomes_an_adapter_that_peft_loads_with_the_same_logprobs(
    settings: Settings, tmp_path: Path
) -> None:
    async with in_memory(settings) as agent:
        saved = await trained(agent)
        reply = await exported(agent, saved["state"], tmp_path / "new" / "adapter")
        left = await agent.call("list_checkpoints", kind="external")
    assert reply["max_difference"] < EXACT
    assert reply["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "new" / "adapter").iterdir()) == reply["files"]
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "adapter"]
    assert left["checkpoints"] == []


async def test_a_trained_head_is_merged_apart_from_the_embedding_it_was_tied_to(
    settings: Settings, tmp_path: Path
) -> None:
    async with in_memory(settings) as agent:
        saved = await trained(agent)
        reply = await exported(agent, saved["state"], tmp_path / "merged", format="merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert reply["max_difference"] < EXACT
    assert "lm_head was trained" in reply["next_step"]


async def test_a_sampler_is_exported_by_the_state_saved_with_it(
    settings: Settings, tmp_path: Path
) -> None:
    async with in_memory(settings) as agent:
        saved = await trained(agent, train_unembed=False)
        reply = await exported(agent, saved["sampler"], tmp_path / "merged", format="merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert reply["max_difference"] < EXACT


async def test_a_sampler_whose_namesake_holds_other_weights_is_refused_and_nothing_stays(
    settings: Settings, tmp_path: Path
) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        await agent.call("save_checkpoint", client_id=client_id, name="end", kind="state")
        await agent.train(client_id, data_id, steps=8, learning_rate=5e-2)
        later = await agent.call("save_checkpoint", client_id=client_id, name="end", kind="sampler")
        asked = {"checkpoint": later["sampler"], "output_dir": str(tmp_path / "out")}
        said = await agent.error("export_weights", **asked)
    assert "is not the same model" in said
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - the names alone


async def test_an_export_longer_than_a_call_is_collected_by_the_same_call(
    settings: Settings, tmp_path: Path
) -> None:
    async with in_memory(settings) as agent:
        saved = await trained(agent)
    async with in_memory(replace(settings, call_limit_s=2.0)) as agent:
        first = await agent.call(
            "export_weights", checkpoint=saved["state"], output_dir=str(tmp_path / "out")
        )
        assert not first["finished"]
        reply = await exported(agent, saved["state"], tmp_path / "out")
    assert reply["max_difference"] < EXACT


async def test_a_server_that_ends_meanwhile_takes_the_export_with_it(
    settings: Settings, tmp_path: Path
) -> None:
    async with in_memory(settings) as agent:
        saved = await trained(agent)
    async with in_memory(replace(settings, call_limit_s=1.0)) as agent:
        await agent.call(
            "export_weights", checkpoint=saved["state"], output_dir=str(tmp_path / "out")
        )
        running = workers()
        assert len(running) == 1
    # asyncio waits for its child; psutil would take the end away from it.
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(process.pid) for process in running):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.1)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - the names alone


async def test_where_an_export_may_not_go_is_told_before_anything_is_loaded(
    settings: Settings, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    async with in_memory(settings) as agent:
        saved = await trained(agent)
        asked = {"checkpoint": saved["state"]}
        occupied = await agent.error("export_weights", **asked, output_dir=str(full))
        outside = await agent.error("export_weights", **asked, output_dir="/elsewhere")
    assert "is not an empty folder" in occupied
    assert "outside the allowed folders" in outside
    assert [file.name for file in full.iterdir()] == ["note.txt"]


async def test_what_cannot_be_exported_says_what_can(settings: Settings, tmp_path: Path) -> None:
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        alone = await agent.call("save_checkpoint", client_id=client_id, name="x", kind="sampler")
        asked = {"output_dir": str(tmp_path / "out")}
        said = await agent.error("export_weights", checkpoint=alone["sampler"], **asked)
        run_id = alone["sampler"].removeprefix("tinker://").partition("/")[0]
        missing = f"tinker://{run_id}/weights/none"
        unknown = await agent.error("export_weights", checkpoint=missing, **asked)
    assert "cannot be downloaded, and no state of its name" in said
    assert "save_checkpoint makes both" in said
    assert unknown.startswith("not_found: ")


def test_what_a_killed_export_left_behind_is_swept_and_that_of_a_live_one_is_not(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".out-{ended.pid}-abcd1234"
    kept = [tmp_path / name for name in (f".out-{os.getpid()}-abcd1234", ".out-mine", "other")]
    for folder in (left, *kept):
        folder.mkdir()
    with _workshop(tmp_path / "out") as workshop:
        assert {workshop, *kept} == set(tmp_path.iterdir())
    assert set(kept) == set(tmp_path.iterdir())


async def test_no_key_is_in_an_exported_folder(
    settings: Settings, home_server: LocalServer, tmp_path: Path
) -> None:
    async with in_memory(settings) as agent:
        saved = await trained(agent)
        await exported(agent, saved["state"], tmp_path / "out")
    key = home_server.api_key.encode()
    assert not any(key in file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert "TINKER_API_KEY" not in os.environ
