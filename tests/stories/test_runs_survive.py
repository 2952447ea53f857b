"""Two runs outlive the servers that started and watched them; the last one tells all of both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.mcp.agents import TINY
from tests.mcp.host_process import Hosted, start
from tests.servers import end_backends

STEPS = 180  # longer than a server takes to start
EVERY = 60
LENGTH = 40  # of a reply in words: so that a step takes its time
SAVED = list(range(EVERY, STEPS + 1, EVERY))
BOUND_S = 150.0
WORDS = [f"{first}{second}" for first in ("red", "blue", "gold", "grey") for second in "abcdefgh"]
ENVIRONMENT = {
    "TINKER_LOCAL_MODELS": TINY,
    "TINKER_LOCAL_DTYPE": "float32",
    "TINKER_MCP_BACKEND": "local",
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home of its own; what runs there at the end is ended."""
    own = tmp_path / "home"
    yield own
    for worker in workers_of(own):
        worker.kill()
        worker.wait(5)
    end_backends(own)


def workers_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            is_worker = "tinker_mcp.runs.worker" in process.cmdline()
            if is_worker and process.environ().get("TINKER_MCP_HOME") == str(home):
                found.append(process)
        except psutil.Error:  # gone meanwhile, or another user's
            continue
    return found


def rows(folder: Path) -> tuple[str, str]:
    """A file of conversations and one of preference pairs."""
    conversations, pairs = folder / "conversations.jsonl", folder / "pairs.jsonl"
    with conversations.open("w") as told, pairs.open("w") as preferred:
        for word in WORDS:
            asked = {"role": "user", "content": f"Say {word}."}
            right, wrong, long = (
                {"role": "assistant", "content": content}
                for content in (f"{word}!", "No.", f"{word}! " * LENGTH)
            )
            told.write(json.dumps({"messages": [asked, long]}) + "\n")
            pair = {"prompt": [asked], "chosen": [right], "rejected": [wrong]}
            preferred.write(json.dumps(pair) + "\n")
    return str(conversations), str(pairs)


def reply(server: Hosted, tool: str, **arguments: Any) -> dict[str, Any]:
    result = server.call(tool, **arguments)
    assert not result.get("isError"), result
    return dict(result["structuredContent"])


def until(done: Callable[[], bool]) -> None:
    """Ask again, each time a call that waits for the run itself."""
    deadline = time.monotonic() + BOUND_S
    while not done():
        assert time.monotonic() < deadline


def started(server: Hosted, **arguments: Any) -> str:
    spec = {"base_model": TINY, "eval_share": 0.25, "rank": 4, "batch_size": 4, "steps": STEPS}
    asked = {**spec, **arguments, "save_every": EVERY, "eval_every": EVERY}
    return str(server.start_run(**asked)[-1]["run_id"])


@pytest.mark.timeout(400)
def test_two_runs_finish_though_their_servers_end(home: Path, tmp_path: Path) -> None:
    def server() -> Hosted:
        return start(home, tmp_path / "server.log", **ENVIRONMENT, TINKER_MCP_ROOTS=str(tmp_path))

    def step(watching: Hosted, run_id: str) -> int:
        return int(reply(watching, "get_run", run_id=run_id, points=0)["step"])

    conversations, pairs = rows(tmp_path)
    first = server()
    until(lambda: not first.call("list_models").get("isError"))  # the backend is ready
    sft = started(first, method="sft", data=conversations)
    dpo = started(first, method="dpo", data=pairs)
    both = {sft, dpo}
    until(lambda: reply(first, "wait_for_run", run_id=sft, until="step=1", timeout_s=5)["finished"])
    first.end("SIGKILL")
    first.wait()

    second = server()
    listed = reply(second, "list_runs")["runs"]
    at_work = {run["run_id"]: run["state"] for run in listed}
    seen = step(second, sft)
    goal = f"step={seen + 1}"
    until(lambda: reply(second, "wait_for_run", run_id=sft, until=goal, timeout_s=5)["finished"])
    second.end("EOF")
    second.wait()

    third = server()
    for run_id in both:
        until(lambda: reply(third, "wait_for_run", run_id=run_id, timeout_s=5)["finished"])  # noqa: B023 (called in this round)
    ended = {run["run_id"]: run["state"] for run in reply(third, "list_runs")["runs"]}
    runs = {run_id: reply(third, "get_run", run_id=run_id, points=200) for run_id in both}
    sampled = reply(third, "sample", run_id=sft, prompt="Say", max_tokens=2)
    third.end("EOF")
    third.wait()

    assert set(at_work) == both
    assert set(at_work.values()) <= {"starting", "running"}
    assert seen < STEPS
    assert ended == dict.fromkeys(both, "completed")
    for run in runs.values():
        train, held_out = run["series"]
        assert train["steps"] == list(range(1, STEPS + 1))
        assert held_out["steps"] == [0, *SAVED]
        assert run["eval_loss"] < run["first_eval_loss"]
        assert [saved["step"] for saved in run["checkpoints"]] == SAVED
    assert sampled["weights"].startswith(f"{sft} at step {STEPS};")
    _, alive = psutil.wait_procs(workers_of(home), timeout=10)
    assert alive == []
