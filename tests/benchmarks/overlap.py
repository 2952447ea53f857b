"""What the shape of a training loop costs on a service that works in clock cycles.

    python -m tests.benchmarks.overlap                   a minute a loop, 5 minutes in all
    python -m tests.benchmarks.overlap --steps 10 --cycle-s 0.3

Three loops take the same steps on the same datums, each in a process of its own, on
`tinker-local serve --cycle-s`: a run of ours, a loop that awaits each call, and the cookbook's
`supervised.train`. The server counts each training client's cycles, from the first with work to
the last; making the client takes one. The second table has evaluations and checkpoints on. For
ours and the cookbook a checkpoint is state and sampler weights, as in the loop that awaits.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx

from tests.cookbook_recipes import RENDERER
from tests.servers import LocalServer, start_server

if TYPE_CHECKING:
    import tinker

BOUND_S = 3600.0
TINY = "tinker-local/tiny"
BATCH_SIZE = 8
HELD_OUT = 8
RANK = 8
LEARNING_RATE = 1e-3
MAX_LENGTH = 256


@dataclass(frozen=True)
class Shape:
    """What every loop does; `every` is that of evaluations and checkpoints, 0 for none."""

    steps: int
    every: int
    folder: str


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        cycles: Of its training client, `wasted` of them with nothing ready.
        seconds: From its first request to its end.
        loss: Of its last step, nats a token.
    """

    loop: str
    steps: int
    cycles: int
    wasted: int
    seconds: float
    loss: float


# The loops, each in a process of its own; they answer with seconds, client and last loss


async def our_run(shape: Shape) -> dict[str, Any]:
    """As a worker does it: store, files and all."""
    from tinker_mcp.runs.attempt import Attempt
    from tinker_mcp.runs.folder import RunFolder
    from tinker_mcp.runs.journal import Journal
    from tinker_mcp.runs.methods import method
    from tinker_mcp.store.runs import RunStore
    from tinker_mcp.training.backend import Backend

    train, held_out = _datums()
    spec, home = _spec(shape, train, held_out), Path(shape.folder)
    RunFolder.of(home, "ours").create(spec, "ours")
    with RunStore(home) as store:
        store.add("ours", spec.model_dump_json())
        store.take("ours", "lease", None, before=None)
    journal = Journal(home, "ours", "lease")
    backend = Backend("local", os.environ["TINKER_BASE_URL"], os.environ["TINKER_API_KEY"])
    began = time.monotonic()
    await method("sft").train(Attempt("ours", spec, train, held_out, journal, backend))
    seconds = time.monotonic() - began
    journal.close()
    with RunStore(home) as store:
        path = store.checkpoints("ours")[-1].state_path
        loss = store.metrics("ours", "train")[-1].numbers["train_mean_nll"]
    return {"seconds": seconds, "model": _model_of(path), "loss": loss}


async def awaiting(shape: Shape) -> dict[str, Any]:
    """Each request is awaited before the next is submitted."""
    import tinker

    from tinker_mcp.training.datums import weight_sum

    train, held_out = _datums()
    loss = math.nan
    began = time.monotonic()
    with tinker.ServiceClient() as service:
        client = await service.create_lora_training_client(TINY, rank=RANK, seed=0)
        for step in range(1, shape.steps + 1):
            batch = _batch(train, step)
            output = await client.forward_backward(batch, "cross_entropy")
            await client.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
            loss = output.metrics["loss:sum"] / weight_sum(batch)
            if shape.every and step % shape.every == 0:
                await client.forward(held_out, "cross_entropy")
            if step == shape.steps or (shape.every and step % shape.every == 0):
                await client.save_state(f"{step:06d}")
                await client.save_weights_for_sampler(f"{step:06d}")
        model = str(client.model_id)
        return {"seconds": time.monotonic() - began, "model": model, "loss": loss}


async def cookbook(shape: Shape) -> dict[str, Any]:
    """`supervised.train` as it comes."""
    from tinker_cookbook.supervised import train

    folder = Path(shape.folder)
    config = train.Config(
        log_path=str(folder),
        model_name=TINY,
        recipe_name="overlap",
        renderer_name=RENDERER,
        dataset_builder=_builder(),
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        lora_rank=RANK,
        num_epochs=math.ceil(shape.steps * BATCH_SIZE / (128 - HELD_OUT)),
        max_steps=shape.steps,
        eval_every=shape.every,
        save_every=shape.every,
    )
    _datums()  # what is imported for it and loaded is not its loop's
    began = time.monotonic()
    await train.main(config)
    seconds = time.monotonic() - began
    last = json.loads((folder / "checkpoints.jsonl").read_text().splitlines()[-1])
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [line["train_mean_nll"] for line in lines if "train_mean_nll" in line]
    return {"seconds": seconds, "model": _model_of(last["state_path"]), "loss": losses[-1]}


LOOPS: Mapping[str, Callable[[Shape], Any]] = {
    "a run of ours": our_run,
    "awaiting each call": awaiting,
    "cookbook `supervised.train`": cookbook,
}


def _builder() -> Any:
    import tinker_cookbook
    from tinker_cookbook.supervised.data import FromConversationFileBuilder
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    examples = Path(tinker_cookbook.__file__).parent / "example_data" / "conversations.jsonl"
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=TINY,
        renderer_name=RENDERER,
        max_length=MAX_LENGTH,
        batch_size=BATCH_SIZE,
    )
    return FromConversationFileBuilder(
        file_path=str(examples), test_size=HELD_OUT, common_config=common
    )


def _datums() -> tuple[list[tinker.Datum], list[tinker.Datum]]:
    """The cookbook's own, to train on and held out."""
    train, held_out = _builder()()
    train.set_epoch(seed=0)
    return tuple(  # type: ignore[return-value]
        [datum for at in range(len(part)) for datum in part.get_batch(at)]
        for part in (train, held_out)
    )


def _batch(train: list[tinker.Datum], step: int) -> list[tinker.Datum]:
    from tinker_mcp.training.loop import batch_of

    return batch_of(train, BATCH_SIZE, step - 1, 0)


def _spec(shape: Shape, train: list[tinker.Datum], held_out: list[tinker.Datum]) -> Any:
    from tinker_mcp.runs.spec import DataFacts, RunSpec

    train_facts, held_out_facts = (
        DataFacts(
            source="example_data/conversations.jsonl",
            sha256="",
            datums=len(datums),
            tokens=sum(datum.model_input.length for datum in datums),
            trained_tokens=0,
        )
        for datums in (train, held_out)
    )
    return RunSpec(
        method="sft",
        name="overlap",
        backend="local",
        base_model=TINY,
        checkpoint=None,
        renderer=RENDERER,
        train_on_what="",
        max_length=MAX_LENGTH,
        train=train_facts,
        held_out=held_out_facts if shape.every else None,
        steps=shape.steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        learning_rate_source="",
        lr_schedule="constant",
        rank=RANK,
        seed=0,
        save_every=shape.every,
        eval_every=shape.every,
        ttl_s=None,
    )


def _model_of(path: str) -> str:
    return path.removeprefix("tinker://").split("/")[0]


# Measuring them


def measure(loop: str, steps: int, every: int, server: LocalServer) -> Row:
    """Run one loop.

    Raises:
        AssertionError: It failed; holds the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="tinker-mcp-overlap-") as folder:
        report = Path(folder) / "report.json"
        shape = Shape(steps, every, str(Path(folder) / "run"))
        Path(shape.folder).mkdir()
        command = [
            *(sys.executable, "-W", "ignore", "-m", "tests.benchmarks.overlap"),
            *("--loop", loop, "--shape", json.dumps(asdict(shape)), "--report", str(report)),
        ]
        done = subprocess.run(
            command,
            env={**os.environ, **server.env, "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BOUND_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        found = json.loads(report.read_text())
    cycles = _stats(server)["cycles_by_training_client"][found["model"]]
    used, wasted = cycles["used"], cycles["wasted"]
    return Row(loop, steps, used + wasted, wasted, found["seconds"], found["loss"])


def _stats(server: LocalServer) -> dict[str, Any]:
    answer = httpx.get(f"{server.base_url}/stats", headers={"X-API-Key": server.api_key})
    stats: dict[str, Any] = answer.raise_for_status().json()
    return stats


def table(rows: list[Row]) -> str:
    """In markdown."""
    lines = [
        "| loop | steps | cycles | of them empty | cycles a step | wall time | last loss |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.loop} | {row.steps} | {row.cycles} | {row.wasted} | "
        f"{row.cycles / row.steps:.2f} | {row.seconds:.1f} s | {row.loss:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--steps", type=click.IntRange(1), default=30, show_default=True)
@click.option("--cycle-s", type=float, default=1.0, show_default=True)
@click.option("--every", type=click.IntRange(1), default=5, show_default=True)
@click.option("--loop", hidden=True)
@click.option("--shape", hidden=True)
@click.option("--report", hidden=True)
def main(
    steps: int, cycle_s: float, every: int, loop: str | None, shape: str | None, report: str | None
) -> None:
    if loop and shape and report:
        found = asyncio.run(LOOPS[loop](Shape(**json.loads(shape))))
        Path(report).write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="tinker-local-overlap-") as room:
        server = start_server(Path(room) / "state", "--cycle-s", str(cycle_s))
        try:
            for title, interval in (
                ("training alone, a checkpoint at the end", 0),
                (f"evaluations and checkpoints every {every} steps", every),
            ):
                rows = [measure(name, steps, interval, server) for name in LOOPS]
                click.echo(f"\nCycles of {cycle_s:g} s, batches of {BATCH_SIZE}: {title}\n")
                click.echo(table(rows))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
