"""The quick way to tokens gives the same tokens."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from planning import TINY, conversations

from servers import LocalServer
from tinker_mcp.training import rendering
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.datums import render
from tinker_mcp.training.formats import Conversation
from tinker_mcp.training.rendering import ModelRenderer

TEXTS = [
    "",
    "Hi",
    " Hi ",
    "<|im_end|>",
    "a<|im_start|>user\n",
    "<|im_start|>user\n" * 9,
    "é😀" * 40,
]


@pytest.fixture
def tiny(runs_server: LocalServer) -> ModelRenderer:
    hub_cache = Path(runs_server.env["HF_HOME"]) / "hub"
    backend = Backend("local", runs_server.base_url, runs_server.api_key, hub_cache)
    return rendering.load(backend, TINY, None)


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("split_special_tokens", [True, False])
def test_every_text_has_the_tokens_that_transformers_gives_it(
    tiny: ModelRenderer, add_special_tokens: bool, split_special_tokens: bool
) -> None:
    quick = tiny.tokenizer
    options = {
        "add_special_tokens": add_special_tokens,
        "split_special_tokens": split_special_tokens,
    }
    for _ in range(2):  # the second time, short ones are remembered
        for text in TEXTS:
            slow = quick(text, **options)["input_ids"]
            assert quick.encode(text, **options) == slow
            assert quick.encode(text) == quick(text)["input_ids"]


def test_a_remembered_text_cannot_be_changed_by_its_taker(tiny: ModelRenderer) -> None:
    first = tiny.tokenizer.encode("Hi", add_special_tokens=False)
    first.append(0)
    assert tiny.tokenizer.encode("Hi", add_special_tokens=False) == first[:-1]


def test_cycles_are_collected_again_after_rendering(tiny: ModelRenderer) -> None:
    rows = [Conversation("line 1", conversations(1)[0]["messages"])]
    assert render(rows, tiny, "all_assistant_messages", 99, "none").datums
    assert gc.isenabled()
