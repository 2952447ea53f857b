"""Reinforcement learning: cycles a step beside the cookbook's loop, and what rewards come to.

    python -m tests.benchmarks.rl                     all of it
    python -m tests.benchmarks.rl cycles --steps 10 --cycle-s 1
    python -m tests.benchmarks.rl rewards --model tinker-local/tiny --seeds 3

`cycles`: runs of ours with K = 0 and K = 1, the cookbook's `rl.train` and its asynchronous form are
asked the same sums on `tinker-local serve --cycle-s`, each in a process of its own. The server
counts the cycles of each training client, from the first with work to the last. An untrained model
gets every sum wrong, and a group of equal rewards carries no gradient, so that our loop would leave
steps out which the cookbook's takes; ours is rewarded by length, to take them all.

`rewards`: the mean reward of the last five steps against the first five, for each task and seed.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import httpx

from tests.cookbook_recipes import RENDERER, Plan, run_recipe
from tests.servers import LocalServer, start_server

BOUND_S = 1800.0
TINY = "tinker-local/tiny"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHOT = [{"role": "user", "content": "What is 4 + 5?"}, {"role": "assistant", "content": "9"}]
"""What the cookbook's sums begin with."""

GROUPS, GROUP_SIZE, MAX_TOKENS, RANK = 4, 4, 16, 8
SHOWN = 5  # steps at the beginning and at the end


@dataclass(frozen=True)
class Task:
    """What is asked, and what is wanted.

    Attributes:
        reward: A built-in one, or the source of a user's file.
    """

    rows: Sequence[Mapping[str, Any]]
    reward: Mapping[str, Any] | str
    max_tokens: int


DIGITS = """
def reward(completion, row):
    said = "".join(c for c in completion if c.isdigit())
    return sum(a == b for a, b in zip(said, row["digits"])) / len(row["digits"])
"""
TASKS: Mapping[str, Task] = {
    "eight digits, one reward each": Task(
        [{"prompt": "What are the digits?", "digits": "31415926"}] * 2, DIGITS, 8
    ),
    "an answer of 12 characters": Task(
        [{"prompt": f"Name a {what}."} for what in ("colour", "river", "fruit", "metal")],
        {"type": "length", "target": 12},
        8,
    ),
    "one-digit sums": Task(
        [{"prompt": f"{a} + {b} =", "answer": a + b} for a in range(1, 5) for b in range(1, 5)],
        {"type": "number"},
        8,
    ),
}


# A run of ours, in this process


def our_run(home: Path, server: LocalServer, spec: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    """Do a run as a worker does it: seconds, rewards, the client's id."""
    from tinker_mcp.runs.attempt import Attempt
    from tinker_mcp.runs.folder import RunFolder
    from tinker_mcp.runs.journal import Journal
    from tinker_mcp.runs.methods import method
    from tinker_mcp.runs.policy.rollouts import load_cookbook
    from tinker_mcp.runs.prompts import Prompt
    from tinker_mcp.runs.spec import RunSpec
    from tinker_mcp.store.runs import RunStore
    from tinker_mcp.training.backend import Backend

    prompts = [
        Prompt([*row.get("shot", []), {"role": "user", "content": row["prompt"]}], row)
        for row in rows
    ]
    whole = RunSpec(**spec)
    RunFolder.of(home, "ours").create(whole, "ours")
    with RunStore(home) as store:
        store.add("ours", whole.model_dump_json())
        store.take("ours", "lease", None, before=None)
    journal = Journal(home, "ours", "lease")
    hub = Path(server.env["HF_HOME"]) / "hub"
    backend = Backend("local", server.base_url, server.api_key, hub)
    load_cookbook()  # before the clock starts, as the cookbook's own runs do
    began = time.monotonic()
    asyncio.run(method("rl").train(Attempt("ours", whole, prompts, [], journal, backend)))
    seconds = time.monotonic() - began
    journal.close()
    with RunStore(home) as store:
        path = store.checkpoints("ours")[-1].state_path
        metrics = store.metrics("ours", "train")
    rewards = [row.numbers["env/all/reward/total"] for row in metrics]
    return {"seconds": seconds, "model": _model_of(path), "rewards": rewards}


def _spec(model: str, steps: int, seed: int, rate: float, rl: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"source": "the benchmark", "sha256": "", "datums": 1, "tokens": 1, "trained_tokens": 0}
    return {
        "method": "rl",
        "name": "benchmark",
        "backend": "local",
        "base_model": model,
        "checkpoint": None,
        "renderer": RENDERER,
        "train_on_what": "sampled_tokens",
        "max_length": 2048,
        "train": facts,
        "held_out": None,
        "steps": steps,
        "batch_size": GROUPS,
        "learning_rate": rate,
        "learning_rate_source": "",
        "lr_schedule": "constant",
        "rank": RANK,
        "seed": seed,
        "save_every": 0,
        "eval_every": 0,
        "ttl_s": None,
        "rl": {"group_size": GROUP_SIZE, "max_tokens": MAX_TOKENS, "temperature": 1.0, **rl},
    }


def _model_of(path: str) -> str:
    return path.removeprefix("tinker://").split("/")[0]


# Cycles


@dataclass(frozen=True)
class Row:
    """A line of the table of cycles."""

    loop: str
    cycles: int
    empty: int
    seconds: float


def cycles_of(server: LocalServer, model: str) -> tuple[int, int]:
    """Cycles of a training client, and how many of them were empty."""
    answer = httpx.get(f"{server.base_url}/stats", headers={"X-API-Key": server.api_key})
    found = answer.raise_for_status().json()["cycles_by_training_client"][model]
    return found["used"] + found["wasted"], found["wasted"]


def measure_ours(server: LocalServer, folder: Path, steps: int, k: int) -> Row:
    """A run of ours that is asked the cookbook's sums."""
    rl = {"reward": {"type": "length", "target": 12}, "max_off_policy_steps": k}
    sums = [f"What is {a} + {100 - a}?" for a in range(steps * GROUPS)]
    rows = [{"prompt": question, "shot": SHOT} for question in sums]
    found = _in_a_process(server, folder, _spec(TINY, steps, 0, 1e-4, rl), rows)
    return Row(f"a run of ours, K = {k}", *cycles_of(server, found["model"]), found["seconds"])


def measure_cookbook(server: LocalServer, folder: Path, steps: int, recipe: str) -> Row:
    """The cookbook's loop as it comes."""
    plan = Plan(
        recipe,
        TINY,
        str(folder),
        steps,
        GROUPS,
        MAX_TOKENS,
        1e-4,
        group_size=GROUP_SIZE,
        rank=RANK,
        max_steps_off_policy=1,
    )
    done = run_recipe(plan, server.env, BOUND_S)
    model = _model_of(done.checkpoints[-1]["state_path"])
    name = {"rl": "cookbook `rl.train`", "rl-async": "the same, asynchronous, K = 1"}[recipe]
    return Row(name, *cycles_of(server, model), done.seconds)


def _in_a_process(
    server: LocalServer, folder: Path, spec: Mapping[str, Any], rows: Any
) -> dict[str, Any]:
    """`our_run` elsewhere, since the cookbook and the SDK keep state in their modules."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {**asdict_of(server), "folder": str(folder), "spec": spec, "rows": rows}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.rl", "one", json.dumps(known)],
        env={**os.environ, **server.env, "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def asdict_of(server: LocalServer) -> dict[str, Any]:
    """What another process needs of a server."""
    return {"base_url": server.base_url, "api_key": server.api_key, "env": server.env}


# Rewards


@dataclass(frozen=True)
class Rise:
    """A line of the table of rewards."""

    task: str
    seed: int
    first: float
    last: float
    seconds: float


def measure_rise(
    server: LocalServer, folder: Path, name: str, model: str, seed: int, steps: int, rate: float
) -> Rise:
    """Train one task."""
    task = TASKS[name]
    reward = task.reward
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(reward, str):
        (folder / "reward.py").write_text(reward)
        reward = {"type": "file", "path": str(folder / "reward.py")}
    rl = {"reward": reward, "max_tokens": task.max_tokens, "group_size": 8}
    spec = {**_spec(model, steps, seed, rate, rl), "batch_size": 2}
    found = _in_a_process(server, folder, spec, list(task.rows))
    rewards = found["rewards"]
    first, last = statistics.mean(rewards[:SHOWN]), statistics.mean(rewards[-SHOWN:])
    return Rise(name, seed, first, last, found["seconds"])


def table_of_cycles(rows: Sequence[Row], steps: int) -> str:
    """In markdown."""
    lines = [
        "| loop | steps | cycles | of them empty | cycles a step | wall time |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.loop} | {steps} | {row.cycles} | {row.empty} | {row.cycles / steps:.2f} | "
        f"{row.seconds:.1f} s |"
        for row in rows
    ]
    return "\n".join(lines)


def table_of_rises(rows: Sequence[Rise]) -> str:
    """In markdown."""
    lines = [
        f"| task | seed | first {SHOWN} steps | last {SHOWN} steps | wall time |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.task} | {row.seed} | {row.first:.3f} | {row.last:.3f} | {row.seconds:.0f} s |"
        for row in rows
    ]
    return "\n".join(lines)


@click.group(invoke_without_command=True, help=(__doc__ or "").partition("\n")[0])
@click.pass_context
def main(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        context.invoke(cycles)
        context.invoke(rewards)


@main.command()
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True)
@click.option("--cycle-s", type=float, default=1.0, show_default=True)
def cycles(steps: int, cycle_s: float) -> None:
    """Cycles a step of four loops."""
    with tempfile.TemporaryDirectory(prefix="tinker-mcp-rl-") as room:
        server = start_server(Path(room) / "state", "--cycle-s", str(cycle_s))
        try:
            rows = [measure_ours(server, Path(room) / f"ours-{k}", steps, k) for k in (0, 1)]
            rows += [
                measure_cookbook(server, Path(room) / recipe, steps, recipe)
                for recipe in ("rl", "rl-async")
            ]
        finally:
            server.stop()
    click.echo(f"\nCycles of {cycle_s:g} s, {GROUPS} groups of {GROUP_SIZE}\n")
    click.echo(table_of_cycles(rows, steps))


@main.command()
@click.option("--model", default=SMOLLM2, show_default=True)
@click.option("--steps", type=click.IntRange(2 * SHOWN), default=15, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS)))
def rewards(
    model: str, steps: int, seeds: int, learning_rate: float, tasks: tuple[str, ...]
) -> None:
    """What rewards come to."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="tinker-mcp-rl-") as room:
        server = start_server(Path(room) / "state", model=model, threads=os.cpu_count() or 1)
        try:
            for number, name in enumerate(tasks or TASKS):
                for seed in range(seeds):
                    folder = Path(room) / f"{number}-{seed}"
                    rise = measure_rise(server, folder, name, model, seed, steps, learning_rate)
                    click.echo(asdict(rise), err=True)
                    rows.append(rise)
        finally:
            server.stop()
    click.echo(f"\n{model}, {steps} steps of 2 groups of 8, rate {learning_rate:g}\n")
    click.echo(table_of_rises(rows))


@main.command(hidden=True)
@click.argument("known")
def one(known: str) -> None:
    """One run of ours, for `_in_a_process`."""
    asked = json.loads(known)
    server: Any = type("Server", (), {k: asked[k] for k in ("base_url", "api_key", "env")})
    folder = Path(asked["folder"])
    found = our_run(folder, server, asked["spec"], asked["rows"])
    (folder / "report.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
