"""What hosts are told of the tools, and what holds for every reply and error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import CONVERSATIONS, TINY, in_memory
from mcp.client import Client

from tinker_mcp.server import create_server
from tinker_mcp.server.app import INSTRUCTIONS, TOOLS
from tinker_mcp.server.boundary import StrictTool
from tinker_mcp.server.schemas import complete_input
from tinker_mcp.settings import Settings

MAX_REPLY_CHARACTERS = 4 * 4_000  # 4k tokens at 4 characters a token


async def listed() -> list[Any]:
    async with Client(create_server(Settings())) as client:
        return list((await client.list_tools()).tools)


async def test_every_tool_has_what_a_host_shows() -> None:
    for tool in await listed():
        assert re.fullmatch(r"[a-z0-9_]{1,24}", tool.name)
        assert tool.title
        assert tool.output_schema
        assert len(tool.description) < 2048
        hints = tool.annotations
        given = (hints.read_only_hint, hints.destructive_hint)
        given += (hints.idempotent_hint, hints.open_world_hint)
        assert None not in given, tool.name
    assert len(INSTRUCTIONS) < 2048


async def test_every_object_of_arguments_takes_no_others() -> None:
    for spec in TOOLS:
        arguments = StrictTool.of(spec, Path()).fn_metadata.arg_model
        for schema in objects(complete_input(arguments.model_json_schema())):
            assert schema["additionalProperties"] is False, spec.title


async def test_hosts_are_told_that_a_tool_takes_no_other_arguments() -> None:
    assert {tool.input_schema["additionalProperties"] for tool in await listed()} == {False}


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """The schemas of objects with named arguments, nested ones too."""
    inner = schema.values() if isinstance(schema, dict) else schema
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
        yield schema
    for value in inner:
        if isinstance(value, dict | list):
            yield from objects(value)


async def test_every_reply_ends_with_the_next_step() -> None:
    assert {tool.output_schema["required"][-1] for tool in await listed()} == {"next_step"}


async def test_the_tools_are_those_of_the_table() -> None:
    assert [tool.name for tool in await listed()] == [spec.fn.__name__ for spec in TOOLS]


async def test_only_the_reading_tools_are_read_only() -> None:
    reading = [tool.name for tool in await listed() if tool.annotations.read_only_hint]
    assert reading == [
        "check_setup",
        "list_models",
        "search_docs",
        "inspect_dataset",
        "list_clients",
        "list_checkpoints",
        "estimate_cost",
        "list_runs",
        "get_run",
        "wait_for_run",
    ]


async def test_check_setup_tells_whether_the_memory_is_enough(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        found = await agent.call("check_setup")
    if found["free_memory_bytes"] is None:  # only Linux tells
        assert found["is_memory_enough"] is None
    else:
        assert found["free_memory_bytes"] > 2**20
        assert found["is_memory_enough"] == (found["free_memory_bytes"] >= 2 * 2**30)


async def test_text_and_structure_say_the_same_and_stay_short(settings: Settings) -> None:
    many = CONVERSATIONS * 16  # 128
    async with in_memory(settings) as agent:
        replies = [
            await agent.call("check_setup"),
            await agent.call("list_models"),
            await agent.new_data(conversations=many, eval_share=0.125),
        ]
        data_id = replies[-1]["data_id"]
        client_id = await agent.new_client()
        replies.append(await agent.train(client_id, data_id, steps=64))
        on_all: dict[str, Any] = {"client_id": client_id, "data_id": data_id}
        replies.append(await agent.call("forward_backward", **on_all))
        replies.append(await agent.call("optim_step", client_id=client_id, learning_rate=1e-3))
        asked = {"client_id": client_id, "prompt": "Say", "num_samples": 16, "max_tokens": 200}
        replies.append(await agent.call("sample", **asked))
        for number in range(2):
            replies.append(
                await agent.call("save_checkpoint", client_id=client_id, name=f"n{number}")
            )
        replies.append(await agent.call("list_checkpoints", limit=50))
    texts = [text for text in agent.texts if '"client_id"' not in text]
    assert [json.loads(text) for text in texts] == replies
    assert [list(json.loads(text))[-1] for text in agent.texts] == ["next_step"] * len(agent.texts)
    assert max(map(len, agent.texts)) < MAX_REPLY_CHARACTERS
    assert len(replies[3]["losses"]) <= 40


async def test_no_reply_and_no_file_shows_the_key(settings: Settings, home_server: Any) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        await agent.train(client_id, data_id)
        await agent.call("check_setup")
        await agent.call("list_models")
        await agent.call("list_checkpoints")
        await agent.error("sample", checkpoint="tinker://none/weights/x", prompt="Hi")
    assert not any(home_server.api_key in text for text in agent.texts)
    logs = [path for path in settings.home.rglob("*") if path.suffix in (".log", ".jsonl")]
    assert logs
    assert not any(home_server.api_key.encode() in path.read_bytes() for path in logs)


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("list_checkpoints", {"limt": 3}, "unknown argument 'limt'; did you mean 'limit'?"),
        ("list_models", {"x": 1}, "unknown argument 'x'; it takes no arguments."),
        ("search_docs", {"query": "x", "limit": 11}, "limit=11: Input should be less than"),
        ("optim_step", {"client_id": "client-1"}, "the argument 'learning_rate' is missing"),
        (
            "optim_step",
            {"client_id": "client-1", "learning_rate": "fast"},
            "learning_rate='fast': Input should be a valid number",
        ),
        (
            "optim_step",
            {"client_id": "client-1", "learning_rate": "inf"},
            "learning_rate='inf': Input should be a valid number",
        ),
        ("search_docs", {"query": "x", "limit": "3"}, "limit='3': Input should be a valid integer"),
        (
            "optim_step",
            {"client_id": "client-1", "learning_rate": -1},
            "learning_rate=-1: Input should be greater than 0",
        ),
        (
            "forward_backward",
            {"client_id": "c", "data_id": "d", "optim": {"learning_rate": 1, "beta_1": 0.5}},
            "unknown argument 'optim.beta_1'; did you mean 'beta1'?",
        ),
        ("sample", {"base_model": TINY, "messages": []}, "messages=[]: List should have at least"),
        ("sample", {"checkpoint": "nonsense", "prompt": "x"}, "checkpoint='nonsense'"),
        ("sample", {"base_model": TINY, "prompt": "x", "stop": [""]}, "stop.0=''"),
        ("create_training_client", {"base_model": TINY, "seed": 2**70}, "seed=1180591620717411"),
        ("build_datums", {"base_model": TINY, "train_on_what": "me"}, "train_on_what='me'"),
        ("save_checkpoint", {"client_id": "c", "name": "a/b"}, "name='a/b'"),
    ],
)
async def test_an_argument_that_cannot_be_used_is_named(
    tool: str, arguments: dict[str, Any], said: str
) -> None:
    async with in_memory(Settings()) as agent:
        error = await agent.error(tool, **arguments)
    assert error.startswith(f"invalid_input: {tool}: {said}")


async def test_a_client_that_would_train_nothing_is_refused(settings: Settings) -> None:
    nothing = {"train_mlp": False, "train_attn": False, "train_unembed": False}
    async with in_memory(settings) as agent:
        error = await agent.error("create_training_client", base_model=TINY, **nothing)
    assert error.startswith("invalid_input: train_mlp, train_attn and train_unembed are all false")


async def test_a_batch_larger_than_the_data_is_refused_at_once(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data = await agent.new_data()
        on = {"client_id": await agent.new_client(), "data_id": data["data_id"]}
        error = await agent.error("train", **on, steps=1, batch_size=10**9, learning_rate=1e-3)
    assert f"batch_size 1000000000 is more than the {data['datums']} datums" in error


async def test_a_long_value_does_not_make_a_long_error() -> None:
    async with in_memory(Settings()) as agent:
        error = await agent.error("optim_step", client_id="c", **{"x" * 5000: 1})
    assert len(error) <= 1500


async def test_a_long_problem_keeps_its_next_step(settings: Settings) -> None:
    rows = [{"messages": [{"role": "r" * 4000, "content": "x"}]}] * 9
    async with in_memory(settings) as agent:
        error = await agent.error("build_datums", base_model=TINY, conversations=rows)
        unknown = await agent.error("optim_step", client_id="c" * 4000, learning_rate=1)
    assert len(error) <= 1500
    assert error.endswith("call again with skip_invalid=true to leave them out.")
    assert len(unknown) <= 1500
    assert unknown.endswith("Call create_training_client to open one.")
