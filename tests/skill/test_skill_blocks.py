"""Every block of code in SKILL.md runs as it stands, on the tiny model under SmolLM2's name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import tinker_cookbook

from servers import LocalServer, start_server
from tests.mcp.agents import Agent, in_memory
from tests.skill.documents import ROOT, SKILL, blocks
from tinker_mcp.server.app import TOOLS
from tinker_mcp.settings import Settings

BLOCKS = blocks(SKILL.read_text("utf-8"))
LOCAL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONVERSATIONS = Path(tinker_cookbook.__file__).parent / "example_data/conversations.jsonl"
BOUND_S = 240.0  # seconds of one block: 15 on an idle machine


@dataclass(frozen=True)
class Place:
    """The folder an agent works in: its data, the skill's scripts, and a state folder."""

    server: LocalServer
    home: Path
    work: Path

    @property
    def variables(self) -> dict[str, str]:
        """What leads our programs to the server of this place."""
        return {"TINKER_MCP_HOME": str(self.home)}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A process in the folder, in which a method that will go is an error."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "HF_HOME"))}
        ours = {
            **self.variables,
            "PYTHONWARNINGS": "error::FutureWarning",
            "PATH": f"{Path(sys.executable).parent}:{plain['PATH']}",
        }
        return subprocess.run(
            command,
            cwd=self.work,
            env={**plain, **ours, **variables},
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("skill")
    server = start_server(home / "local", "--alias", f"{LOCAL_MODEL}=tinker-local/tiny")
    work = home / "work"
    work.mkdir()
    (work / "data.jsonl").write_bytes(CONVERSATIONS.read_bytes())
    sums = [{"prompt": f"What is {n} + {n}?", "answer": 2 * n} for n in range(8)]
    (work / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sums))
    (work / "reward.py").write_text(the("python reward"))
    (work / "scripts").symlink_to(ROOT / "scripts")
    yield Place(server, home, work)
    server.stop()


def the(language: str) -> str:
    """The only block of its language."""
    (found,) = [block.code for block in BLOCKS if block.language == language]
    return found


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {block.language for block in BLOCKS} == {
        "sh",
        "python",
        "python tools",
        "python reward",
    }


def test_the_commands_run(place: Place) -> None:
    ended = place.run("bash", "-euo", "pipefail", "-c", the("sh"))

    assert ended.returncode == 0, ended.stderr
    first = json.loads((place.work / "first.json").read_text())
    assert first["held_out_nll_after"] < first["held_out_nll_before"]


def test_the_loop_on_the_plain_sdk_runs(place: Place) -> None:
    ended = place.run(sys.executable, "-c", the("python"), **place.server.env)

    assert ended.returncode == 0, ended.stderr
    losses = [float(line.split()[1]) for line in ended.stdout.splitlines()[:14]]
    assert losses[-1] < losses[0]
    assert "held out:" in ended.stdout


async def test_the_calls_of_tools_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both blocks in one server, as an agent would go on from one to the next."""
    monkeypatch.chdir(place.work)
    settings = Settings.from_environment(place.variables)
    replies: dict[str, dict[str, Any]] = {}
    async with in_memory(settings) as agent:
        tools = [spec.fn.__name__ for spec in TOOLS]
        names: dict[str, Any] = {name: called(agent, name, replies) for name in tools}
        for block in BLOCKS:
            if block.language == "python tools":
                await anyio.to_thread.run_sync(exec, block.code, names)

    waited, run = replies["wait_for_run"], replies["get_run"]
    assert (waited["state"], waited["step"]) == ("completed", 20), waited
    assert run["eval_loss"] < run["first_eval_loss"]
    assert [case["ok"] for case in replies["test_reward"]["cases"]] == [True, True]


def called(
    agent: Agent, name: str, replies: dict[str, dict[str, Any]]
) -> Callable[..., dict[str, Any]]:
    """A tool as a function for another thread, called until it has finished."""

    def call(**arguments: Any) -> dict[str, Any]:
        deadline = time.monotonic() + BOUND_S
        while True:
            reply = anyio.from_thread.run(partial(agent.call, name, **arguments))
            if reply.get("finished", True) or time.monotonic() > deadline:
                replies[name] = reply
                return reply

    return call
