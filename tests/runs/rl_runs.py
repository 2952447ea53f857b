"""Runs of rl on the tiny model, whose tokens are bytes: small rewards that it can learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from attempts import Run, backend_of, sentences, spec_of

from servers import LocalServer
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.rl_options import RlOptions
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.runs.transcripts import last, path_in
from tinker_mcp.training.backend import Backend

WORDS = ("red", "green", "blue", "black")
SHORT = {"type": "length", "unit": "tokens", "max": 4}
"""1 where the answer has at most four tokens, which the untrained model's never have."""

SMALL = {"type": "regex", "pattern": "[a-z]"}
"""1 where there is a small letter, as in half of the untrained model's answers."""

NEAR = {"type": "length", "target": 6}
"""The nearer to six characters, the more: no two answers of a group need be alike."""

LETTERS = "def reward(completion, row):\n    return sum(c.islower() for c in completion) / 8\n"

REWARD = "env/all/reward/total"


def rl_backend_of(server: LocalServer) -> Backend:
    """The server, with the tokenizers that it keeps."""
    return replace(backend_of(server), hub_cache=Path(server.env["HF_HOME"]) / "hub")


def asked(words: tuple[str, ...] = WORDS) -> list[Prompt]:
    """Four prompts."""
    return [Prompt([{"role": "user", "content": f"Say {word}."}], {"word": word}) for word in words]


def rl_spec(**changes: Any) -> RunSpec:
    """4 steps of 2 groups of 4 samples of 8 tokens; `changes` of either the run or its rl."""
    options: dict[str, Any] = {
        "group_size": 4,
        "max_tokens": 8,
        "temperature": 1.0,
        "reward": SMALL,
    }
    for name in list(changes):
        if name in RlOptions.model_fields:
            options[name] = changes.pop(name)
    if "environment" in options:
        options["reward"] = None
    settings = {"method": "rl", "rl": RlOptions(**options), "steps": 4}
    return spec_of(sentences(), [], **{**settings, **changes})


def an_rl_run(home: Path, **changes: Any) -> Run:
    """A run of `rl_spec` on four prompts, or on an environment."""
    train = [] if changes.get("environment") else asked()
    held_out = changes.pop("held_out", [])
    return Run(home, rl_spec(**changes), train, held_out)  # type: ignore[arg-type]


def rewards(run: Run) -> list[float]:
    """Mean reward by step."""
    return list(run.series("train", REWARD).values())


def transcripts(run: Run, count: int = 100) -> list[dict[str, Any]]:
    return transcripts_in(run.folder.path, count)


def transcripts_in(folder: Path, count: int = 100) -> list[dict[str, Any]]:
    return last(path_in(folder), count)
