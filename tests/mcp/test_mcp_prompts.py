"""Prompts are files, and what they say is true of the tools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp_types import GetPromptResult

from tinker_mcp.server import create_server
from tinker_mcp.server.completions import QUESTIONS
from tinker_mcp.server.prompts import Workflow, folder, parsed, workflows
from tinker_mcp.settings import Settings

NAMES = (
    "choose_method, compare_checkpoints, debug_run, design_reward, finetune, plan_run, "
    "research_idea, review_before_spending"
)
FILE = """\
---
name: greet
title: Greet
description: Says hello: to somebody.
arguments:
  - name: first
    description: A name.
    required: true
  - name: last
    description: Another.
---
Hello {last|first}, {last|friend}. {"type": {...}} {"name": "{first}"}
"""
ALL = pytest.mark.parametrize("workflow", workflows(), ids=lambda workflow: workflow.name)


async def told(name: str, **arguments: str) -> str:
    async with Client(create_server(Settings())) as client:
        prompt = await client.get_prompt(name, arguments)
    return _text(prompt)


def _text(prompt: GetPromptResult) -> str:
    return str(getattr(prompt.messages[0].content, "text", ""))


async def test_every_workflow_is_a_prompt_with_its_arguments() -> None:
    async with Client(create_server(Settings())) as client:
        listed = {prompt.name: prompt for prompt in (await client.list_prompts()).prompts}
    assert ", ".join(listed) == NAMES
    assert all(prompt.title and prompt.description for prompt in listed.values())
    arguments = {a.name: a.required for a in listed["compare_checkpoints"].arguments or []}
    assert arguments == {"checkpoint": True, "other": False, "base_model": False, "path": False}
    assert all(a.description for prompt in listed.values() for a in prompt.arguments or [])


@ALL
def test_a_files_name_is_its_prompts_name(workflow: Workflow) -> None:
    assert (folder("prompts") / f"{workflow.name}.md").exists()


async def test_a_prompt_is_told_with_and_without_what_is_optional() -> None:
    async with Client(create_server(Settings())) as client:
        for workflow in workflows():
            required = {a.name: f"<{a.name}>" for a in workflow.arguments if a.required}
            every = {a.name: f"<{a.name}>" for a in workflow.arguments}
            bare = _text(await client.get_prompt(workflow.name, required))
            full = _text(await client.get_prompt(workflow.name, every))
            assert all(value in bare for value in required.values())
            assert all(value in full for value in every.values())
            assert not re.search(r"\{\w+[|}]", bare + full)  # a place that is not filled in


async def test_every_required_argument_that_is_missing_is_named() -> None:
    async with Client(create_server(Settings())) as client:
        for workflow in workflows():
            required = [a.name for a in workflow.arguments if a.required]
            for name in required:
                others = {other: "x" for other in required if other != name}
                with pytest.raises(MCPError, match=f"the argument '{name}' is missing"):
                    await client.get_prompt(workflow.name, others)


async def test_an_argument_stands_where_it_is_named_and_words_where_it_is_not_given() -> None:
    assert 'path="/d/x.jsonl"' in await told("finetune", path="/d/x.jsonl")
    assert "a model from list_models" in await told("finetune", path="x")
    assert "Fine-tune tiny on x" in await told("finetune", path="x", base_model="tiny")


async def test_an_arguments_braces_are_not_read_again() -> None:
    assert "b on {base_model} by" in await told("finetune", path="{base_model}", base_model="b")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("nope", {}, f"Unknown prompt 'nope'; there are: {NAMES}."),
        ("choose_method", {}, "takes goal, path: the argument 'goal' is missing."),
        ("finetune", {"path": "x", "y": "1"}, "there is no argument 'y'."),
    ],
)
async def test_a_prompt_that_cannot_be_told_says_why(
    name: str, arguments: dict[str, str], said: str
) -> None:
    async with Client(create_server(Settings())) as client:
        with pytest.raises(MCPError, match=re.escape(said)) as caught:
            await client.get_prompt(name, arguments)
    assert caught.value.error.code == -32602


def test_frontmatter_gives_names_arguments_and_text() -> None:
    workflow = parsed(FILE)
    assert (workflow.name, workflow.title) == ("greet", "Greet")
    assert workflow.description == "Says hello: to somebody."
    assert [(a.name, a.required) for a in workflow.arguments] == [("first", True), ("last", False)]
    ann = 'Hello Ann, friend. {"type": {...}} {"name": "Ann"}'
    assert workflow.told({"first": "Ann"}) == ann
    assert workflow.told({"first": "Ann", "last": "Bo"}).startswith("Hello Bo, Bo.")


def test_frontmatter_without_a_title_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks title"):
        parsed(FILE.replace("title: Greet\n", ""))


def test_a_place_for_an_argument_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\{middle\} names no argument"):
        parsed(FILE.replace("{last|friend}", "{middle}"))


async def test_the_questions_that_complete_are_those_of_the_text() -> None:
    text = await told("research_idea")
    assert re.findall(r"^- \*\*(\w+)\.\*\*", text, re.MULTILINE) == list(QUESTIONS)


@ALL
def test_a_prompt_is_short_enough_to_be_followed(workflow: Workflow) -> None:
    path = Path(folder("prompts") / f"{workflow.name}.md")
    lines = workflow.text.count("\n") + 1
    assert 25 <= lines <= 60, path
