"""Conversations to datums: shift, weights, cuts. The tiny model's tokens are bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import rendering
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.datums import (
    measure,
    render,
    supervised_datum,
    trained_tokens,
    weight_sum,
)
from tinker_mcp.training.formats import Conversation
from tinker_mcp.training.marking import marked

if TYPE_CHECKING:
    import tinker

    from tinker_mcp.training.rendering import ModelRenderer

TALK = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]


def datum_of(
    tiny: ModelRenderer,
    train_on_what: str = "all_assistant_messages",
    max_length: int = 2048,
    reduction: Any = "none",
) -> tinker.Datum:
    talk = Conversation("line 1", TALK)
    return supervised_datum(talk, tiny, train_on_what, max_length, reduction)[0]


def column(datum: tinker.Datum, name: str) -> list[float]:
    return list(datum.loss_fn_inputs[name].tolist())


def test_position_t_predicts_token_t_plus_1(tiny: ModelRenderer) -> None:
    tokens = tiny.supervised(TALK, "all_assistant_messages")[0].to_ints()  # type: ignore[arg-type]
    datum = datum_of(tiny)
    assert datum.model_input.to_ints() == tokens[:-1]
    assert column(datum, "target_tokens") == tokens[1:]
    assert len(column(datum, "weights")) == len(tokens) - 1


@pytest.mark.parametrize(
    ("train_on_what", "trained"),
    [
        ("last_assistant_message", ["A2<|im_end|>"]),
        ("last_assistant_turn", ["A2<|im_end|>"]),
        ("all_assistant_messages", ["A1<|im_end|>", "A2<|im_end|>"]),
    ],
)
def test_only_the_assistants_words_and_its_end_of_turn_carry_weight(
    tiny: ModelRenderer, train_on_what: str, trained: list[str]
) -> None:
    example = marked(datum_of(tiny, train_on_what), tiny)
    assert [part.split("⟧")[0] for part in example.split("⟦")[1:]] == trained


def test_all_tokens_trains_on_every_target(tiny: ModelRenderer) -> None:
    datum = datum_of(tiny, "all_tokens")
    assert trained_tokens(datum) == datum.model_input.length


def test_all_messages_trains_on_the_users_words_too(tiny: ModelRenderer) -> None:
    example = marked(datum_of(tiny, "all_messages"), tiny)
    assert "⟦Q1<|im_end|>" in example


def test_the_mark_shows_the_whole_conversation(tiny: ModelRenderer) -> None:
    assert marked(datum_of(tiny), tiny) == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧"
    )


def test_a_long_example_keeps_its_two_ends(tiny: ModelRenderer) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "x" * 3000}]
    datum, _ = supervised_datum(
        Conversation("line 1", talk), tiny, "all_assistant_messages", 4000, "none"
    )
    example = marked(datum, tiny)
    assert len(example) == 1200 + len(" ... ")
    assert example.startswith("<|im_start|>user\nQ1")
    assert example.endswith("<|im_end|>⟧")


def test_reduction_mean_makes_the_weights_of_a_datum_sum_to_1(tiny: ModelRenderer) -> None:
    assert weight_sum([datum_of(tiny)]) == len("A1") + len("A2") + 2  # each with its end of turn
    assert weight_sum([datum_of(tiny, reduction="mean")]) == pytest.approx(1, abs=1e-6)


def test_a_long_conversation_loses_its_end_and_is_counted(tiny: ModelRenderer) -> None:
    whole = [*datum_of(tiny).model_input.to_ints(), column(datum_of(tiny), "target_tokens")[-1]]
    limit = len(whole) - 5
    built = render([Conversation("line 1", TALK)], tiny, "all_assistant_messages", limit, "none")
    assert built.truncated == 1
    kept = built.datums[0]
    assert [*kept.model_input.to_ints(), column(kept, "target_tokens")[-1]] == whole[:limit]
    assert measure(built.datums).longest == limit


def test_a_conversation_of_exactly_max_length_is_whole(tiny: ModelRenderer) -> None:
    length = datum_of(tiny).model_input.length + 1
    built = render([Conversation("line 1", TALK)], tiny, "all_assistant_messages", length, "none")
    assert (built.truncated, measure(built.datums).longest) == (0, length)


def test_nothing_left_to_train_on_names_the_conversation(tiny: ModelRenderer) -> None:
    built = render([Conversation("line 7", TALK)], tiny, "last_assistant_message", 20, "none")
    assert built.datums == []
    [problem] = built.problems
    assert problem.place == "line 7"
    assert problem.what.startswith("no token to train on is left within max_length 20 of its 49")
    assert problem.what.endswith("raise max_length")


def test_what_the_renderer_refuses_names_the_conversation(tiny: ModelRenderer) -> None:
    strange = [TALK[0], {"role": "assistant", "content": "", "tool_calls": ["look it up"]}]
    built = render([Conversation("line 3", strange)], tiny, "all_assistant_messages", 99, "none")
    assert str(built.problems[0]).startswith("line 3: the renderer qwen3_instruct refuses it: ")


def test_statistics_count_the_tokens_of_conversations_not_of_targets(tiny: ModelRenderer) -> None:
    datum = datum_of(tiny)
    length = datum.model_input.length + 1
    statistics = measure([datum, datum])
    assert (statistics.total, statistics.trained) == (2 * length, 2 * trained_tokens(datum))
    assert (statistics.shortest, statistics.median, statistics.longest) == (length,) * 3


def test_an_unknown_renderer_is_named_with_what_to_do(backend: Backend) -> None:
    with pytest.raises(InvalidInputError, match=r"'no_such' cannot be used.*list_models"):
        rendering.load(backend, "tinker-local/tiny", "no_such")


@pytest.mark.parametrize("name", ["no-such-model", "", "a/b/c", "..", "/tmp"])  # noqa: S108
def test_an_unknown_model_is_named_with_what_to_do(backend: Backend, name: str) -> None:
    with pytest.raises(InvalidInputError, match="list_models") as caught:
        rendering.load(backend, name, None)
    assert repr(name) in str(caught.value)


def test_an_answer_without_its_end_is_not_complete(tiny: ModelRenderer) -> None:
    assert tiny.answer(tiny.encode("Blue.<|im_end|>")) == ("Blue.", True)
    assert tiny.answer(tiny.encode("Blu")) == ("Blu", False)
