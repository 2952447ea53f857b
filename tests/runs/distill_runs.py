"""Distillations on the tiny model, whose tokens are bytes, and teachers for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from attempts import Run, backend_of, sentences, spec_of

from servers import LocalServer
from tinker_mcp.runs.distill_options import DistillOptions
from tinker_mcp.runs.planning.estimate import Estimate
from tinker_mcp.runs.planning.plan import Planned
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.store.runs import RunStore
from tinker_mcp.training.backend import Backend
from tiny_data import TINY

WORDS = ("red", "green", "blue", "black")
HELD_OUT_WORDS = ("teal", "lime")


def distill_backend_of(server: LocalServer) -> Backend:
    """The server, with the tokenizers that it keeps."""
    return replace(backend_of(server), hub_cache=Path(server.env["HF_HOME"]) / "hub")


def asked(words: tuple[str, ...] = WORDS) -> list[Prompt]:
    """A prompt a word."""
    return [Prompt([{"role": "user", "content": f"Say {word}."}], {}) for word in words]


def spec_and_prompts(**changes: Any) -> tuple[RunSpec, list[Prompt], list[Prompt]]:
    """4 steps on four prompts; `changes` of either the run or its options."""
    options: dict[str, Any] = {
        "mode": "on_policy",
        "teacher_base_model": TINY,
        "teacher_renderer": "qwen3_instruct",
        "group_size": 2,
        "max_tokens": 8,
        "temperature": 1.0,
    }
    for name in list(changes):
        if name in DistillOptions.model_fields:
            options[name] = changes.pop(name)
    train, held_out = changes.pop("train", asked()), changes.pop("held_out", [])
    settings = {"method": "distill", "distill": DistillOptions(**options), "steps": 4}
    return spec_of(sentences(), **{**settings, **changes}), train, held_out


def a_distillation(home: Path, **changes: Any) -> Run:
    """A run of that, to be attempted in this process."""
    return Run(home, *spec_and_prompts(**changes))


def a_planned_distillation(**changes: Any) -> Planned:
    """The same for a worker."""
    spec, train, held_out = spec_and_prompts(**changes)
    return Planned(spec, train, held_out, (), Estimate("local", {}, 0.0, 0.0))


async def a_teacher(backend: Backend, home: Path, steps: int = 12) -> str:
    """Sampler weights of the tiny model after some steps of sft."""
    run = Run(home, spec_of(sentences(), steps=steps, learning_rate=2e-2), sentences())
    await run.attempt(backend)
    return run.checkpoints()[-1].sampler_path


def notes(run: Run) -> list[str]:
    """What the run remarked."""
    with RunStore(run.home) as store:
        return [event.what for event in store.events(run.run_id) if event.kind == "note"]
