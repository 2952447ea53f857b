"""Whatever a prompt names exists: tools and their arguments, words of replies, scripts, options."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import jsonschema
import pytest
from mcp.client import Client
from prompt_calls import Call, calls, code, dicts, is_open
from pydantic import BaseModel, TypeAdapter

from tinker_mcp.runs.distill_options import DistillArguments
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.rl_options import RlArguments
from tinker_mcp.server import create_server, docs
from tinker_mcp.server.completions import QUESTIONS
from tinker_mcp.server.prompts import Workflow, workflows
from tinker_mcp.settings import Settings
from tinker_mcp.training import models
from tinker_mcp.training.rewards import specs
from tinker_mcp.training.rewards.specs import RewardSpec
from tinker_mcp.training.rewards.trial import Groups
from tinker_mcp.training.verdicts import Fitness

ROOT = Path(__file__).parents[2]
SCRIPTING = ROOT / "src/tinker_mcp/scripting.py"  # options that all scripts share
CHECKPOINT = "tinker://run:train:0/sampler_weights/name"
TOOLS = "tinker_mcp.server.tools"
REPLIES = ("data", "inspection", "rewards", "run_replies", "costs", "sampling", "setup", "training")
ALL = pytest.mark.parametrize("workflow", workflows(), ids=lambda workflow: workflow.name)


@cache
def tools() -> dict[str, dict[str, Any]]:
    """Input and output schema of each tool."""
    import anyio

    async def listed() -> dict[str, dict[str, Any]]:
        async with Client(create_server(Settings())) as client:
            found = (await client.list_tools()).tools
        return {tool.name: {"in": tool.input_schema, "out": tool.output_schema} for tool in found}

    return anyio.run(listed)


def filled(workflow: Workflow) -> str:
    """A prompt with a word for each argument; a method is a real one."""
    words = {a.name: "word" for a in workflow.arguments}
    return workflow.told(words | {"method": "sft", "checkpoint": CHECKPOINT})


def every_call() -> list[Any]:
    found = [(w.name, call) for w in workflows() for call in calls(filled(w))]
    return [
        pytest.param(call, id=f"{name}-{call.tool}-{n}") for n, (name, call) in enumerate(found)
    ]


def words_of(schema: Any) -> Iterator[str]:
    """Names and allowed values within a schema."""
    for one in dicts(schema):
        yield from one.get("properties", {})
        yield from (value for value in one.get("enum", ()) if isinstance(value, str))


@pytest.mark.parametrize("call", every_call())
def test_a_call_fits_its_tools_schema(call: Call) -> None:
    properties = tools()[call.tool]["in"]["properties"]
    for name, value in call.arguments.items():
        assert name in properties
        if not any(is_open(one) for one in _parts(value)):
            jsonschema.validate(value, properties[name] | _definitions(call.tool))


@pytest.mark.parametrize("call", every_call())
def test_a_calls_options_are_those_of_runs_and_rewards(call: Call) -> None:
    asked = call.arguments if call.tool == "start_run" else call.arguments.get("spec", {})
    assert set(asked) <= set(RunArguments.model_fields)
    for name, options in (("rl", RlArguments), ("distill", DistillArguments)):
        if isinstance(asked.get(name), dict):
            assert set(asked[name]) <= set(options.model_fields)
    for one in dicts(dict(call.arguments)):
        if "type" in one:
            _check_reward(one)


@ALL
def test_rewards_and_options_outside_of_calls_exist_too(workflow: Workflow) -> None:
    text = filled(workflow).replace("true", "True")
    for piece in re.findall(r'`(\{"type".*?\})`', text):
        _check_reward(eval(piece, {}))  # noqa: S307 - a literal of ours, with ... in it
    for name, options in (("rl", RlArguments), ("distill", DistillArguments)):
        for piece in re.findall(rf"`{name}=(\{{.*?\}})`", text):
            assert set(eval(piece, {})) <= set(options.model_fields)  # noqa: S307 - the same


@ALL
def test_every_name_in_a_prompt_is_one_of_the_projects(workflow: Workflow) -> None:
    named = {
        word
        for piece in code(filled(workflow))
        if "scripts/" not in piece
        for word in re.findall(r"[a-z]+(?:_[a-z]+)+", piece)
    }
    assert named <= known_words()


@cache
def known_words() -> set[str]:
    found = set(tools()) | {w.name for w in workflows()} | set(QUESTIONS)
    found |= {a.name for w in workflows() for a in w.arguments}
    for model in (RunArguments, RlArguments, DistillArguments):
        found |= {*model.model_fields, *words_of(model.model_json_schema())}
    for schemas in tools().values():
        found |= {*words_of(schemas["in"]), *words_of(schemas["out"])}
    pages = [page for page in docs.page_names() if not page.startswith("prompt-")]
    found |= {word for page in pages for word in re.findall(r"[a-z_]+", docs.page(page))}
    found |= set(words_of(TypeAdapter(RewardSpec).json_schema()))
    replies = [c for name in REPLIES for c in _models(importlib.import_module(f"{TOOLS}.{name}"))]
    found |= {field for reply in replies for field in reply.model_fields}
    found |= {*get_args(Fitness), *vars(Groups)["__dataclass_fields__"]}
    return found | {"answer_ten_times", "prompt_echoed"}  # keys of `games`


@ALL
def test_every_script_and_its_options_exist(workflow: Workflow) -> None:
    shared = SCRIPTING.read_text("utf-8") if SCRIPTING.exists() else ""
    commands = [piece for piece in code(filled(workflow)) if "scripts/" in piece]
    assert len(commands) == filled(workflow).count("scripts/")
    for command in commands:
        name, *rest = command.split()
        text = (ROOT / name).read_text("utf-8") + shared
        assert all(f'"{option}"' in text for option in rest if option.startswith("--")), command


@ALL
def test_a_prompt_has_no_model_but_by_list_models(workflow: Workflow) -> None:
    names = re.findall(r"\b[A-Z]\w+/[\w.-]+", workflow.text)
    assert not names
    assert not any(name.partition("/")[2] in workflow.text for name in models.NEAREST)


def test_a_search_that_a_prompt_asks_for_finds_something_at_once() -> None:
    queries = [
        str(call.arguments["query"])
        for workflow in workflows()
        for call in calls(filled(workflow))
        if call.tool == "search_docs" and not is_open(call.arguments["query"])
    ]
    pages = {query: docs.index().search(query, 1)[0].section.page for query in queries}
    assert len(pages) >= 7
    assert set(pages.values()) <= {"data", "evaluation", "methods", "models", "rewards"}, pages


def _parts(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict):
        for one in value.values():
            yield from _parts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _parts(one)


def _definitions(tool: str) -> dict[str, Any]:
    return {"$defs": tools()[tool]["in"].get("$defs", {})}


def _check_reward(reward: dict[str, Any]) -> None:
    classes: list[type[BaseModel]] = [c for c in _reward_classes() if _type_of(c) == reward["type"]]
    assert classes, reward
    known = {field.alias or name for name, field in classes[0].model_fields.items()}
    assert set(reward) <= known, reward


def _reward_classes() -> list[type[BaseModel]]:
    return [c for c in _models(specs) if "type" in c.model_fields]


def _models(module: ModuleType) -> list[type[BaseModel]]:
    return [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, BaseModel)]


def _type_of(reward: type[BaseModel]) -> str:
    return str(get_args(reward.model_fields["type"].annotation)[0])
