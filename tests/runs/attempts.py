"""One attempt at a run in this process: real store, real folder, real backend."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servers import LocalServer
from tinker_mcp.runs.attempt import Attempt, Outcome
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.journal import Journal
from tinker_mcp.runs.methods import method
from tinker_mcp.runs.spec import DataFacts, RunSpec
from tinker_mcp.store.rows import CheckpointRow, MetricKind
from tinker_mcp.store.runs import RunStore
from tinker_mcp.training.backend import Backend
from tiny_data import TINY, sdk_datum, tokens_of

if TYPE_CHECKING:
    import tinker

RUN_ID = "run-of-a-test"
LEASE = "lease"
WORDS = ("red", "green", "blue", "black", "white", "pink", "gold", "grey")
BOUND_S = 120.0


def sentences() -> list[tinker.Datum]:
    """Eight datums to train on."""
    return [sdk_datum(f"Say {word}: {word}!") for word in WORDS]


def held_out_sentences() -> list[tinker.Datum]:
    return [sdk_datum(f"Say {word}: {word}!") for word in ("teal", "lime")]


def pairs(words: Sequence[str] = WORDS) -> list[tinker.Datum]:
    """Chosen, rejected, chosen, rejected ...: the reply alone carries weight."""
    datums = []
    for word in words:
        for reply in (f"{word}!", "No, never."):
            prompt = f"Say {word}: "
            weights = [0.0] * (len(tokens_of(prompt)) - 1) + [1.0] * len(tokens_of(reply))
            datums.append(sdk_datum(prompt + reply, weights))
    return datums


def backend_of(server: LocalServer) -> Backend:
    return Backend("local", server.base_url, server.api_key)


def spec_of(
    train: Sequence[tinker.Datum], held_out: Sequence[tinker.Datum] = (), **changes: Any
) -> RunSpec:
    """A run of the tiny model: 6 steps of sft with batches of 2 at a constant rate of 1e-2."""
    settings: dict[str, Any] = {
        "method": "sft",
        "name": "a test",
        "backend": "local",
        "base_model": TINY,
        "checkpoint": None,
        "renderer": "qwen3_instruct",
        "train_on_what": "all_tokens",
        "max_length": 512,
        "train": _facts(train),
        "held_out": _facts(held_out) if held_out else None,
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "learning_rate_source": "the test",
        "lr_schedule": "constant",
        "rank": 4,
        "seed": 0,
        "save_every": 0,
        "eval_every": 0,
        "ttl_s": None,
    }
    return RunSpec(**{**settings, **changes})


def _facts(datums: Sequence[tinker.Datum]) -> DataFacts:
    tokens = sum(datum.model_input.length for datum in datums)
    return DataFacts(
        source="a test",
        sha256=f"{len(datums)}-{tokens}",
        datums=len(datums),
        tokens=tokens,
        trained_tokens=tokens,
    )


@dataclass
class Run:
    """A run of a home of its own, attempted in this process, again and again if need be."""

    home: Path
    spec: RunSpec
    train: Sequence[tinker.Datum]
    held_out: Sequence[tinker.Datum] = ()
    run_id: str = RUN_ID

    def __post_init__(self) -> None:
        self.folder.create(self.spec, self.run_id)
        with RunStore(self.home) as store:
            store.add(self.run_id, self.spec.model_dump_json())
            assert store.take(self.run_id, LEASE, None, before=None)

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.home, self.run_id)

    def journal(self) -> Journal:
        return Journal(self.home, self.run_id, LEASE)

    def change(self, **changes: Any) -> None:
        """As a resume with other arguments does."""
        self.spec = self.spec.model_copy(update=changes)
        with RunStore(self.home) as store:
            store.set_spec(self.run_id, self.spec.model_dump_json())

    async def attempt(self, backend: Backend, journal: Journal | None = None) -> Outcome:
        """From its last checkpoint on, as a worker would."""
        own = journal or self.journal()
        start = own.rewind()
        own.running()
        attempt = Attempt(
            run_id=self.run_id,
            spec=self.spec,
            train=self.train,
            held_out=self.held_out,
            journal=own,
            backend=backend,
            start=start,
        )
        before = asyncio.all_tasks()
        try:
            async with asyncio.timeout(BOUND_S):
                return await method(self.spec.method).train(attempt)
        finally:
            own.close()
            assert asyncio.all_tasks() - before == set()  # nothing is left pending

    def series(self, kind: MetricKind, name: str) -> dict[int, float]:
        """A metric by step."""
        with RunStore(self.home) as store:
            rows = store.metrics(self.run_id, kind)
        return {row.step: row.numbers[name] for row in rows}

    def losses(self) -> list[float]:
        return list(self.series("train", method(self.spec.method).LOSS).values())

    def checkpoints(self) -> list[CheckpointRow]:
        with RunStore(self.home) as store:
            return store.checkpoints(self.run_id)

    def warnings(self) -> list[str]:
        with RunStore(self.home) as store:
            return [event.what for event in store.events(self.run_id) if event.kind == "warning"]
