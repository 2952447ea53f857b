"""What the tests of plans ask for, and on what data."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.plan import Planned, checked
from tinker_mcp.settings import Settings
from tinker_mcp.training.backend import Backend, BackendConnector
from tinker_mcp.training.building import BuildPlan, Built, build
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.datums import DatumKind

TINY = "tinker-local/tiny"


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {number}."},
                {"role": "assistant", "content": f"{number}!"},
            ]
        }
        for number in range(100, 100 + count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Say {number}.", "chosen": f"{number}!", "rejected": "No."}
        for number in range(100, 100 + count)
    ]


def write(folder: Path, rows: list[Any], name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class _WithTokenizers(BackendConnector):
    """Finds the tokenizers of a hosted backend where those of the local one lie."""

    hub_cache: Path | None = None

    def running(self) -> Backend | None:
        found = super().running()
        if found is None or self.hub_cache is None:
            return found
        return replace(found, hub_cache=self.hub_cache)


@asynccontextmanager
async def workspace_on(
    settings: Settings, hub_cache: Path | None = None
) -> AsyncIterator[Workspace]:
    """An open workspace; a backend that was asked for as hosted needs a `hub_cache`."""
    connector = _WithTokenizers(settings, {})
    connector.hub_cache = hub_cache
    workspace = Workspace(connector)
    try:
        yield workspace
    finally:
        await workspace.close()
        workspace.connector.close()


async def planned(workspace: Workspace, data: str, **asked: Any) -> Planned:
    """A plan that must succeed."""
    return await checked(workspace, arguments(data, **asked))


async def refusal(workspace: Workspace, data: str, **asked: Any) -> str:
    """What a plan that must fail says."""
    with pytest.raises(InvalidInputError) as refused:
        await checked(workspace, arguments(data, **asked))
    return str(refused.value)


def arguments(data: str, **asked: Any) -> RunArguments:
    defaults: dict[str, Any] = {"method": "sft", "data": data, "eval_share": 0}
    if "checkpoint" not in asked:
        defaults["base_model"] = TINY
    return RunArguments(**{**defaults, **asked})


async def built(
    workspace: Workspace, rows: list[Any], kind: DatumKind = "supervised", **changed: Any
) -> Built:
    """Datums under a handle, as build_datums makes them."""
    asked: dict[str, Any] = {
        "path": None,
        "columns": {},
        "base_model": TINY,
        "renderer": None,
        "train_on_what": "all_assistant_messages",
        "max_length": 2048,
        "eval_share": 0,
        "seed": 0,
        "reduction": "none",
        "skip_invalid": False,
        **changed,
    }
    if kind == "preference":
        asked["train_on_what"] = "last_assistant_message"
    made = await build(workspace, BuildPlan(kind=kind, conversations=rows, **asked))
    assert made is not None
    return made
