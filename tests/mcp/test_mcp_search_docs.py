"""search_docs finds the section that answers, offline."""

from __future__ import annotations

from typing import Any

import pytest
from agents import in_memory
from mcp.client import Client

from tinker_mcp import errors
from tinker_mcp.server import create_server, docs
from tinker_mcp.server.docs import Index, Section
from tinker_mcp.settings import Settings

METHODS = "Which method: sft, rl, dpo, distill or prompt_distill"


async def found(query: str, **arguments: Any) -> dict[str, Any]:
    async with in_memory(Settings()) as agent:
        return await agent.call("search_docs", query=query, **arguments)


@pytest.mark.parametrize(
    ("query", "page", "section"),
    [
        ("TrainingClient is poisoned", "errors", "This TrainingClient is poisoned"),
        ("backend_starting", "errors", "backend_starting"),
        ("ppo clip thresholds", "losses", "ppo"),
        ("which learning rate for DPO", "hyperparameters", None),
        ("loss is NaN", "errors", "The loss is NaN or infinite"),
        ("optim_step grad_clip_norm", "tools", "optim_step"),
        ("sampler weights or state?", "pitfalls", "State and sampler weights are two things"),
        ("workflow to design a reward", "prompt-design_reward", None),
        (
            "which method should I use, sft or rl",
            "methods",
            METHODS,
        ),
        ("is Llama 3.1 retired", "models", "Retired models"),
        ("price per million tokens", "models", "Prices of hosted models"),
        ("ShareGPT layout", "data", "Layouts of a row"),
        ("forward_backward_async old example", "sdk", "Where old examples fail"),
        ("download the weights", "checkpoints", "Get the weights out"),
        ("train on images", "vision", "Train on images"),
        ("how many prompts to be sure", "evaluation", "How sure a number is"),
        ("a game of several turns", "runs", "Environments: several turns, tools, games"),
        ("out of memory", "errors", "Out of memory on the local backend"),
        ("how many examples do I need", "data", "How much data: how many examples"),
        ("order of work", "skill", "The order of work"),
        ("a reward that is gamed", "rewards", "Rewards that are gamed"),
        ("resume a crashed run", "runs", "Resume after a stop or a crash"),
        ("max_usd budget of a run", "runs", "What a run costs"),
        ("run state waiting", "runs", "States"),
    ],
)
async def test_a_question_leads_to_its_section(query: str, page: str, section: str | None) -> None:
    best = (await found(query, limit=3))["results"]
    places = [(hit["page"], hit["section"]) for hit in best]
    if section is None:
        assert page in [place[0] for place in places]
    else:
        assert (page, section) in places


async def test_a_result_is_short_and_its_uri_can_be_read() -> None:
    async with Client(create_server(Settings())) as client:
        reply = await client.call_tool("search_docs", {"query": "learning rate", "limit": 10})
        assert reply.structured_content is not None
        hits = reply.structured_content["results"]
        pages = [await client.read_resource(hit["uri"]) for hit in hits]
    assert len(hits) == 10
    assert max(len(hit["excerpt"]) for hit in hits) <= 400
    for hit, page in zip(hits, pages, strict=True):
        assert f"# {hit['section']}\n" in getattr(page.contents[0], "text", "")


async def test_a_search_without_results_says_which_pages_exist() -> None:
    nothing = await found("xylophone")
    assert nothing["results"] == []
    assert all(name in nothing["next_step"] for name in docs.page_names())


def test_every_code_of_an_error_is_explained() -> None:
    codes = {error.code for error in _tree(errors.TinkerMcpError)} - {"error", "demo"}
    explained = {section.title for section in docs.sections("errors", docs.page("errors"))}
    assert codes <= explained


def test_every_tool_stands_in_the_reference() -> None:
    from tinker_mcp.server.app import TOOLS

    titles = [section.title for section in docs.sections("tools", docs.page("tools"))][1:]
    assert titles == [spec.fn.__name__ for spec in TOOLS]


def test_a_rare_word_counts_more_than_a_common_one() -> None:
    index = Index(
        [
            Section("a", "One", "rate rate rate"),
            Section("b", "Two", "rate poisoned"),
            Section("c", "Three", "rate"),
        ]
    )
    assert next(hit.section.page for hit in index.search("poisoned rate", 3)) == "b"


def _tree(error: type[Exception]) -> list[Any]:
    below = [found for child in error.__subclasses__() for found in _tree(child)]
    return [error, *below]
