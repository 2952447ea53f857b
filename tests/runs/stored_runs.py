"""Runs that are written to a store by hand, for what only reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.spec import DataFacts, RunSpec
from tinker_mcp.store.runs import RunStore

LEASE = "lease-1"
NO_PROCESS = None  # a crash is then told by the heartbeat alone


def make_spec(**fields: Any) -> RunSpec:
    """An sft run of 100 steps on the tiny model."""
    facts = DataFacts(
        source="colours.jsonl", sha256="ab" * 32, datums=8, tokens=80, trained_tokens=9
    )
    return RunSpec(
        **{
            "method": "sft",
            "name": "colours",
            "backend": "local",
            "base_model": "tinker-local/tiny",
            "checkpoint": None,
            "renderer": "role_colon",
            "train_on_what": "all_assistant_messages",
            "max_length": 64,
            "train": facts,
            "held_out": facts,
            "steps": 100,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "learning_rate_source": "given",
            "lr_schedule": "constant",
            "rank": 4,
            "seed": 0,
            "save_every": 5,
            "eval_every": 5,
            "ttl_s": 3600,
            **fields,
        }
    )


class StoredRun:
    """A run whose worker is this test."""

    def __init__(self, home: Path, run_id: str = "sft-1", **fields: Any) -> None:
        self.home, self.run_id = home, run_id
        self.spec = make_spec(**fields)
        self.folder = RunFolder.of(home, run_id)
        self.folder.create(self.spec, run_id)
        with RunStore(home) as store:
            store.add(run_id, self.spec.model_dump_json())
            assert store.take(run_id, LEASE, NO_PROCESS, before=None)
            store.move(run_id, LEASE, "running")

    def train(self, *losses: float, first: int = 1) -> None:
        metric = "dpo_loss" if self.spec.method == "dpo" else "train_mean_nll"
        with RunStore(self.home) as store:
            for step, loss in enumerate(losses, first):
                numbers = {metric: loss, "num_tokens": 20.0}
                store.record(self.run_id, LEASE, "train", step, numbers)

    def evaluate(self, step: int, loss: float) -> None:
        with RunStore(self.home) as store:
            store.record(self.run_id, LEASE, "eval", step, {"test/nll": loss})

    def checkpoint(self, step: int, *, is_final: bool = False) -> None:
        state, sampler = (f"tinker://a/{kind}/{step:06d}" for kind in ("weights", "sampler"))
        with RunStore(self.home) as store:
            store.record_checkpoint(self.run_id, LEASE, step, state, sampler, is_final)

    def warn(self, what: str) -> None:
        with RunStore(self.home) as store:
            store.tell(self.run_id, LEASE, "warning", what)

    def move(self, state: str, reason: str | None = None, detail: str | None = None) -> None:
        with RunStore(self.home) as store:
            store.move(self.run_id, LEASE, state, reason=reason, detail=detail)
