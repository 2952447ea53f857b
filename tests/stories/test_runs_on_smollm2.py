"""Durable runs on the default model, a real one: planned, started in their own process, done."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import pytest

from servers import LocalServer, start_server
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.plan import Planned, checked
from tinker_mcp.runs.states import ACTIVE
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings
from tinker_mcp.store.runs import RunStore
from tinker_mcp.training.backend import BackendConnector
from tinker_mcp.training.clients import Workspace

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
BOUND_S = 270.0
LOOK_S = 0.2


# The worker outlives whoever started it, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """SmolLM2, as users have it, where the runs of its home look for a backend."""
    home = tmp_path_factory.mktemp("home")
    server = start_server(home / "local", "--dtype", "auto", model=SMOLLM2)
    yield server
    server.stop()


@pytest.fixture
def settings(smollm2: LocalServer, tmp_path: Path) -> Settings:
    conversations = Path(str(resources.files("tinker_cookbook") / "example_data"))
    return Settings(home=smollm2.state_dir.parent, roots=(tmp_path, conversations))


def completed(settings: Settings, **arguments: Any) -> str:
    """A run that was planned, started, and has come to its planned end; its id."""
    asked = RunArguments(base_model=SMOLLM2, rank=16, save_every=0, eval_every=0, **arguments)
    supervisor = Supervisor(settings)
    row = supervisor.start(asyncio.run(planned(settings, asked)))
    deadline = time.monotonic() + BOUND_S
    while row.state in ACTIVE and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        row = supervisor.run(row.run_id)
    if row.state in ACTIVE:
        psutil.Process(row.pid).kill()
    log = RunFolder.of(settings.home, row.run_id).log.read_text()
    assert row.state == "completed", f"{row.state}: {row.detail}\n{log}"
    return row.run_id


async def planned(settings: Settings, asked: RunArguments) -> Planned:
    workspace = Workspace(BackendConnector(settings))
    try:
        async with asyncio.timeout(BOUND_S):
            return await checked(workspace, asked)
    finally:
        await workspace.close()


def held_out(settings: Settings, run_id: str, name: str) -> list[float]:
    """A metric of the held-out set, by step."""
    with RunStore(settings.home) as store:
        return [row.numbers[f"test/{name}"] for row in store.metrics(run_id, "eval")]


def test_sft_lowers_the_loss_on_conversations_it_never_saw(settings: Settings) -> None:
    run_id = completed(
        settings,
        method="sft",
        data=str(settings.roots[1] / "conversations.jsonl"),
        eval_share=0.0625,  # 8 of 128
        steps=10,
        batch_size=8,
        learning_rate=5e-4,
        max_length=128,
        accept=("truncation", "learning_rate"),
    )
    before, after = held_out(settings, run_id, "nll")
    assert after < before - 0.05


def write_pairs(path: Path) -> None:
    """The chosen answer is short and to the point, the rejected one is neither."""
    things = (
        *("tree", "fish", "tool", "planet", "river", "metal", "bird", "number", "season", "city"),
        *("fruit", "colour", "game", "dance", "song", "poem", "ship", "stone", "spice", "grain"),
        *("cloud", "shoe", "lamp", "door"),
    )
    rows = [
        {
            "prompt": f"Name a {thing}.",
            "chosen": f"Gladly: here is a {thing}.",
            "rejected": f"I would rather not say anything about a {thing} today.",
        }
        for thing in things
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_dpo_comes_to_prefer_the_chosen_answers_to_prompts_it_never_saw(
    settings: Settings, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    run_id = completed(
        settings,
        method="dpo",
        data=str(tmp_path / "pairs.jsonl"),
        eval_share=0.25,  # 6 of 24 pairs
        steps=8,
        batch_size=4,
        learning_rate=2e-4,
        accept=("learning_rate",),
    )
    accuracy, loss = (held_out(settings, run_id, name) for name in ("accuracy", "dpo_loss"))
    assert accuracy[-1] > 0.8 > accuracy[0]
    assert loss[-1] < loss[0]
