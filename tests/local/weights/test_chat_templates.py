"""Chat templates against the cookbook's `qwen3_instruct` renderer, token for token."""

from __future__ import annotations

from typing import Any

import pytest

from tinker_local.weights import ModelFiles

SYSTEM = {"role": "system", "content": "You are terse."}
QUESTION = {"role": "user", "content": "What is 12 x 12?\n  Show it."}
ANSWER = {"role": "assistant", "content": "144 — twelve dozen 🙂."}
FOLLOW_UP = {"role": "user", "content": "And 13 x 13?"}


@pytest.fixture(params=["smollm2", "tiny"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoTokenizer

    files: ModelFiles = request.getfixturevalue(request.param)
    return AutoTokenizer.from_pretrained(files.folder, local_files_only=True)


@pytest.fixture
def renderer(tokenizer: Any) -> Any:
    from tinker_cookbook.renderers import get_renderer

    return get_renderer("qwen3_instruct", tokenizer)


@pytest.mark.parametrize(
    "messages", [[SYSTEM, QUESTION], [SYSTEM, QUESTION, ANSWER, FOLLOW_UP]], ids=["one", "two"]
)
def test_a_prompt_is_what_qwen3_instruct_renders(
    tokenizer: Any, renderer: Any, messages: list[dict[str, str]]
) -> None:
    by_template = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )

    assert by_template == renderer.build_generation_prompt(messages).to_ints()


def test_a_conversation_is_what_qwen3_instruct_renders_but_for_the_last_newline(
    tokenizer: Any, renderer: Any
) -> None:
    messages = [SYSTEM, QUESTION, ANSWER]

    by_template = tokenizer.apply_chat_template(messages, return_dict=False)

    rendered, _ = renderer.build_supervised_example(messages)
    assert by_template == [*rendered.to_ints(), *tokenizer.encode("\n")]


def test_sampling_stops_at_the_end_of_the_message(tokenizer: Any, renderer: Any) -> None:
    assert renderer.get_stop_sequences() == [tokenizer.eos_token_id]
