"""Resources and completions: what the server knows, by address and by its first letters."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from agents import TINY, Agent
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp_types import PromptReference, ResourceTemplateReference

from tinker_mcp.server import create_server, docs
from tinker_mcp.settings import Settings

FINETUNE = PromptReference(type="ref/prompt", name="finetune")


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Client]:
    async with Client(create_server(settings)) as client:
        yield client


async def read(client: Client, uri: str) -> str:
    return str(getattr((await client.read_resource(uri)).contents[0], "text", ""))


async def test_every_page_of_the_docs_is_a_resource(tmp_path: Path) -> None:
    async with connected(Settings(home=tmp_path)) as client:
        uris = [str(resource.uri) for resource in (await client.list_resources()).resources]
        for name in docs.page_names():
            assert f"tinker-mcp://docs/{name}" in uris
            assert (await read(client, f"tinker-mcp://docs/{name}")).startswith("# ")


async def test_models_clients_and_checkpoints_are_json(settings: Settings) -> None:
    async with connected(settings) as client:
        agent = Agent(client)
        client_id = await agent.new_client()
        saved = await agent.call("save_checkpoint", client_id=client_id, name="kept")
        models = json.loads(await read(client, "tinker-mcp://models"))
        clients = json.loads(await read(client, "tinker-mcp://clients"))
        one = json.loads(await read(client, f"tinker-mcp://clients/{client_id}"))
        model = json.loads(await read(client, f"tinker-mcp://models/{TINY}"))
        checkpoints = json.loads(await read(client, "tinker-mcp://checkpoints"))
        bare = saved["state"].removeprefix("tinker://")
        state = json.loads(await read(client, f"tinker-mcp://checkpoints/{bare}"))
    assert TINY in [row["name"] for row in models["models"]]
    assert [row["client_id"] for row in clients["clients"]] == [client_id]
    assert one == clients["clients"][0]
    assert (one["base_model"], one["rank"], one["step"]) == (TINY, 4, 0)
    assert model["name"] == TINY
    assert saved["state"] in [row["checkpoint"] for row in checkpoints["checkpoints"]]
    assert (state["checkpoint"], state["base_model"]) == (saved["state"], TINY)


async def test_reading_starts_no_backend(tmp_path: Path) -> None:
    async with connected(Settings(home=tmp_path)) as client:
        models = json.loads(await read(client, "tinker-mcp://models"))
        checkpoints = json.loads(await read(client, "tinker-mcp://checkpoints"))
    assert (models["backend"], models["models"]) == ("not running", [])
    assert (checkpoints["backend"], checkpoints["checkpoints"]) == ("not running", [])
    assert not (tmp_path / "local").exists()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("tinker-mcp://docs/none", "No page 'none'; there are: checkpoints"),
        ("tinker-mcp://clients/client-9", "not_found: No training client 'client-9'"),
        ("tinker-mcp://models/none", "No model 'none' is served"),
        ("tinker-mcp://replies/none.json", "No reply 'none.json' is kept"),
        ("tinker-mcp://replies/..%2Flocal%2Fserver.json", "Unknown resource"),
        ("tinker-mcp://nowhere", "Unknown resource"),
    ],
)
async def test_a_resource_that_is_not_there_is_named(tmp_path: Path, uri: str, said: str) -> None:
    async with connected(Settings(home=tmp_path)) as client:
        with pytest.raises(MCPError, match=re.escape(said)) as caught:
            await client.read_resource(uri)
    assert caught.value.error.code == -32602
    assert caught.value.error.data == {"uri": uri}


async def test_arguments_are_completed_from_what_exists(settings: Settings) -> None:
    async with connected(settings) as client:
        agent = Agent(client)
        client_id = await agent.new_client()
        saved = await agent.call("save_checkpoint", client_id=client_id, name="completed")
        models = await completed(client, FINETUNE, "base_model", "TINKER-l")
        clients = await completed(
            client,
            ResourceTemplateReference(type="ref/resource", uri="tinker-mcp://clients/{client_id}"),
            "client_id",
            "cl",
        )
        compare = PromptReference(type="ref/prompt", name="compare_checkpoints")
        checkpoints = await completed(client, compare, "checkpoint", "completed")
        others = await completed(client, compare, "other", "completed")
        paths = await completed(client, FINETUNE, "path", "/")
    assert models == [TINY]
    assert clients == [client_id]
    assert {saved[kind] for kind in ("state", "sampler") if saved[kind]} <= set(checkpoints)
    assert others == checkpoints
    assert paths == []


async def test_without_a_backend_nothing_is_suggested_and_nothing_fails(tmp_path: Path) -> None:
    async with connected(Settings(home=tmp_path)) as client:
        assert await completed(client, FINETUNE, "base_model", "") == []
        page = ResourceTemplateReference(type="ref/resource", uri="tinker-mcp://docs/{page}")
        assert await completed(client, page, "page", "l") == ["losses", *await _with_l(client)]


@pytest.mark.parametrize(
    ("prompt", "argument", "typed", "values"),
    [
        ("plan_run", "method", "dis", ["distill", "prompt_distill"]),
        ("review_before_spending", "method", "", ["sft", "dpo", "rl", "distill", "prompt_distill"]),
        ("research_idea", "question", "judge", ["pairwise_judge"]),
        ("choose_method", "goal", "a", []),
    ],
)
async def test_what_a_prompt_chooses_from_is_completed(
    tmp_path: Path, prompt: str, argument: str, typed: str, values: list[str]
) -> None:
    async with connected(Settings(home=tmp_path)) as client:
        ref = PromptReference(type="ref/prompt", name=prompt)
        assert await completed(client, ref, argument, typed) == values


async def _with_l(client: Client) -> list[str]:
    return [name for name in docs.page_names() if "l" in name and not name.startswith("l")]


async def completed(client: Client, ref: Any, name: str, value: str) -> list[str]:
    result = await client.complete(ref, {"name": name, "value": value})
    return list(result.completion.values)
