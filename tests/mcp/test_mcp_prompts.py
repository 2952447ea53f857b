"""Prompts are files, and what they say is true of the tools."""

from __future__ import annotations

import re

import pytest
from mcp.client import Client
from mcp.shared.exceptions import MCPError

from tinker_mcp.server import create_server
from tinker_mcp.server.app import TOOLS
from tinker_mcp.server.prompts import Workflow, parsed, workflows
from tinker_mcp.settings import Settings

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
Hello {last|first}, {last|friend}.
"""


async def told(name: str, **arguments: str) -> str:
    async with Client(create_server(Settings())) as client:
        prompt = await client.get_prompt(name, arguments)
    return str(getattr(prompt.messages[0].content, "text", ""))


async def test_every_workflow_is_a_prompt_with_its_arguments() -> None:
    async with Client(create_server(Settings())) as client:
        listed = (await client.list_prompts()).prompts
    assert [prompt.name for prompt in listed] == ["compare", "fine_tune", "prefer", "reinforce"]
    assert all(prompt.title and prompt.description for prompt in listed)
    fine_tune = {a.name: a.required for a in listed[1].arguments or []}
    assert fine_tune == {"path": True, "base_model": False}


async def test_an_argument_stands_where_it_is_named_and_words_where_it_is_not_given() -> None:
    assert "on /d/x.jsonl and" in await told("fine_tune", path="/d/x.jsonl")
    assert "a model from list_models" in await told("fine_tune", path="x")
    assert "Fine-tune tiny on x" in await told("fine_tune", path="x", base_model="tiny")


async def test_an_arguments_braces_are_not_read_again() -> None:
    assert "on {base_model} and" in await told("fine_tune", path="{base_model}", base_model="b")


@pytest.mark.parametrize("workflow", workflows(), ids=lambda workflow: workflow.name)
def test_a_workflow_leaves_no_place_unfilled(workflow: Workflow) -> None:
    given = {argument.name: "x" for argument in workflow.arguments if argument.required}
    assert "{" not in workflow.told(given)


@pytest.mark.parametrize("workflow", workflows(), ids=lambda workflow: workflow.name)
def test_a_workflow_names_only_tools_that_exist(workflow: Workflow) -> None:
    arguments = {"eval_share", "base_model", "forward_only", "max_tokens", "client_id", "group_id"}
    others = {"policy_gradient", "fine_tune", "importance_sampling"}
    text = workflow.text
    named = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)) - arguments - others
    tools = {spec.fn.__name__ for spec in TOOLS} | {"compute_logprobs"}
    assert named <= tools


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("nope", {}, "Unknown prompt 'nope'; there are: compare, fine_tune, prefer, reinforce."),
        ("fine_tune", {}, "takes path, base_model: the argument 'path' is missing."),
        ("fine_tune", {"path": "x", "y": "1"}, "there is no argument 'y'."),
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
    assert workflow.told({"first": "Ann"}) == "Hello Ann, friend."
    assert workflow.told({"first": "Ann", "last": "Bo"}) == "Hello Bo, Bo."


def test_frontmatter_without_a_title_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks title"):
        parsed(FILE.replace("title: Greet\n", ""))
