"""build_datums: each kind of datums, and what is checked before any is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tinker
from agents import CONVERSATIONS, TINY, in_memory

from tinker_mcp.settings import Settings
from tinker_mcp.training.checks import datum_problem
from tinker_mcp.training.datums import (
    preference_datums,
    render,
    text_datums,
    trained_tokens,
    weight_sum,
)
from tinker_mcp.training.formats import Conversation, Pair, Text
from tinker_mcp.training.marking import marked
from tinker_mcp.training.rendering import ModelRenderer

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Hello"}
BAD = {"role": "assistant", "content": "Go away"}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}


def test_a_text_is_trained_on_from_its_second_token_without_a_chat_format(
    tiny: ModelRenderer,
) -> None:
    (datum,) = text_datums(Text("line 1", "abcd"), tiny, 99, "none")
    assert datum.model_input.to_ints() == tiny.encode("abc")
    assert datum.loss_fn_inputs["target_tokens"].tolist() == tiny.encode("bcd")
    assert datum.loss_fn_inputs["weights"].tolist() == [1.0, 1.0, 1.0]
    assert marked(datum, tiny) == "a⟦bcd⟧"


@pytest.mark.parametrize(
    ("text", "pieces"), [("abcd", ["abcd"]), ("abcdefgh", ["abcd", "efgh"]), ("abcde", ["abcd"])]
)
def test_a_long_text_becomes_a_datum_of_every_max_length_tokens(
    tiny: ModelRenderer, text: str, pieces: list[str]
) -> None:
    built = render([Text("line 1", text)], tiny, "all_tokens", 4, "none")
    assert [marked(datum, tiny) for datum in built.datums] == [f"{p[0]}⟦{p[1:]}⟧" for p in pieces]
    assert (built.truncated, built.split_texts) == (0, int(len(pieces) > 1))


async def test_a_txt_file_has_a_text_a_line(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "rhymes.txt").write_text("one two\n\nthree four five\n")
    asked = {"base_model": TINY, "path": str(tmp_path / "rhymes.txt"), "kind": "text"}
    async with in_memory(settings) as agent:
        built = await agent.call("build_datums", **asked)
    assert (built["datums"], built["split_texts"]) == (2, 0)
    assert built["tokens"]["longest"] == len("three four five")


def test_a_text_of_one_token_is_refused(tiny: ModelRenderer) -> None:
    built = render([Text("line 1", "a")], tiny, "all_tokens", 99, "none")
    assert "1 token long" in str(built.problems[0])


def test_a_pair_is_what_the_cookbook_makes_of_the_comparison(
    tiny: ModelRenderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinker_cookbook.preference.types import Comparison

    earlier = [ASK, SAY, {"role": "user", "content": "And?"}]
    comparison = Comparison(earlier, [SAY], [BAD])  # type: ignore[arg-type]
    pair = Pair("line 1", [*earlier, SAY], [*earlier, BAD])
    made, _ = preference_datums(pair, tiny, 999)
    for datum, completion in zip(
        made, (comparison.completion_A, comparison.completion_B), strict=True
    ):
        from tinker_cookbook.supervised.common import datum_from_model_input_weights

        # dpo_datasets.DPODatasetBuilderFromComparisons, comparison_to_datum
        tokens, weights = tiny.renderer.build_supervised_example(
            [*comparison.prompt_conversation, *completion]
        )
        expected = datum_from_model_input_weights(tokens, weights, 999, reduction="none")
        assert datum.model_input == expected.model_input
        for name in ("target_tokens", "weights"):
            theirs = expected.loss_fn_inputs[name].tolist()
            assert datum.loss_fn_inputs[name].tolist() == theirs
    assert [marked(datum, tiny).split("⟦")[1:] for datum in made] == [
        ["Hello<|im_end|>⟧"],
        ["Go away<|im_end|>⟧"],
    ]


def test_a_pair_that_is_the_same_once_cut_is_refused(tiny: ModelRenderer) -> None:
    long = [ASK, {**SAY, "content": "x" * 100 + "a"}], [ASK, {**SAY, "content": "x" * 100 + "b"}]
    built = render([Pair("line 4", *long)], tiny, "all_tokens", 90, "none")
    assert "line 4: chosen and rejected are the same within max_length 90" in str(built.problems[0])


def test_a_message_of_weight_0_is_not_trained_on(tiny: ModelRenderer) -> None:
    talk = [ASK, {**SAY, "weight": 0}, ASK, {**BAD, "weight": 1}]
    for train_on_what in ("all_assistant_messages", "last_assistant_message", "all_messages"):
        built = render([Conversation("line 1", talk)], tiny, train_on_what, 999, "none")
        assert "⟦Go away<|im_end|>" in marked(built.datums[0], tiny)
        assert "⟦Hello" not in marked(built.datums[0], tiny)


def test_the_cookbooks_trainable_is_honoured_as_well(tiny: ModelRenderer) -> None:
    talk = [ASK, {**SAY, "trainable": False}, ASK, {**BAD, "trainable": True}]
    built = render([Conversation("line 1", talk)], tiny, "all_assistant_messages", 999, "none")
    assert marked(built.datums[0], tiny).count("⟦") == 1


@pytest.mark.parametrize(
    ("train_on_what", "problem"),
    [
        ("last_assistant_message", "no token of it is to be trained"),
        ("all_tokens", "weight 0, which train_on_what=all_tokens cannot honour"),
    ],
)
def test_a_weight_0_that_leaves_nothing_or_cannot_be_honoured_is_named(
    tiny: ModelRenderer, train_on_what: str, problem: str
) -> None:
    talk = [ASK, SAY, ASK, {**BAD, "weight": 0}]
    built = render([Conversation("line 1", talk)], tiny, train_on_what, 999, "none")
    assert problem in str(built.problems[0])


def test_other_marks_are_taken_where_the_text_holds_them(tiny: ModelRenderer) -> None:
    (datum,) = text_datums(Text("line 1", "a⟦b"), tiny, 99, "none")
    assert marked(datum, tiny) == "[trained tokens stand between ⟪ and ⟫]\na⟪⟦b⟫"
    (datum,) = text_datums(Text("line 1", "a⟦⟫⦅<<TRAINED:"), tiny, 99, "none")
    assert marked(datum, tiny).endswith("\na<<TRAINED-1:⟦⟫⦅<<TRAINED::TRAINED-1>>")


def datum_of(tokens: list[int], **columns: tuple[str, list[float]]) -> tinker.Datum:
    inputs: dict[str, Any] = {
        name: tinker.TensorData(data=data, dtype=dtype, shape=[len(data)])  # type: ignore[arg-type]
        for name, (dtype, data) in columns.items()
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


TARGETS = ("int64", [2, 3])
WEIGHTS = ("float32", [0.0, 1.0])


@pytest.mark.parametrize(
    ("tokens", "columns", "problem"),
    [
        ([1, 2], {"target_tokens": TARGETS, "weights": WEIGHTS}, None),
        ([1, 2], {"target_tokens": TARGETS, "advantages": ("float32", [0.0, -1.0])}, None),
        ([1, 2], {"weights": WEIGHTS}, "it has no target_tokens"),
        (
            [1, 2, 3],
            {"target_tokens": TARGETS, "weights": WEIGHTS},
            "target_tokens has 2 values for 3 positions",
        ),
        (
            [1, 2],
            {"target_tokens": TARGETS, "weights": ("float32", [1.0])},
            "weights has 1 values for 2 positions",
        ),
        ([1, 2], {"target_tokens": ("float32", [2.0, 3.0])}, "target_tokens are float32"),
        (
            [1, 2],
            {"target_tokens": TARGETS, "weights": ("float32", [0.0, 0.0])},
            "all weights are 0",
        ),
        (
            [1, 2],
            {"target_tokens": TARGETS, "weights": ("float32", [1.0, float("nan")])},
            "weights are not all finite",
        ),
        ([1, 10], {"target_tokens": TARGETS}, "token 10 is not among the 10 of the vocabulary"),
        ([1, 2], {"target_tokens": ("int64", [2, -3])}, "token -3 is not among"),
        ([], {"target_tokens": ("int64", [])}, "it has no position"),
    ],
)
def test_what_the_sdk_does_not_check_is_checked(
    tokens: list[int], columns: Any, problem: str | None
) -> None:
    found = datum_problem(datum_of(tokens, **columns), 10)
    assert found == problem if problem is None else problem in str(found)


def test_a_datum_without_weights_counts_the_tokens_that_have_an_advantage() -> None:
    datum = datum_of([1, 2, 3], target_tokens=TARGETS, advantages=("float32", [0.0, -0.5, 2.0]))
    assert trained_tokens(datum) == 2
    assert weight_sum([datum, datum]) == 4.0


async def test_pairs_are_kept_chosen_first_and_split_as_pairs(
    settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([json.dumps(PAIR)] * 4))
    async with in_memory(settings) as agent:
        built = await agent.call(
            "build_datums", base_model=TINY, path=str(path), kind="preference", eval_share=0.25
        )
    assert (built["datums"], built["eval_datums"]) == (6, 2)
    assert built["example"].endswith("⟦Hello<|im_end|>⟧")
    assert 'loss_fn="dpo"' in built["next_step"]
    assert built["next_step"].endswith(
        f'start_run(method="dpo", data="{built["data_id"]}", base_model="{TINY}", '
        f'eval_data="{built["eval_data_id"]}").'
    )


async def test_text_is_built_from_a_column_of_any_name(settings: Settings) -> None:
    rows = [{"body": "Once upon a time"}]
    async with in_memory(settings) as agent:
        asked = {"base_model": TINY, "conversations": rows, "kind": "text"}
        said = await agent.error("build_datums", **asked)
        built = await agent.call("build_datums", **asked, columns={"text": "body"})
    assert "Call inspect_dataset" in said
    assert built["tokens"]["trained"] == built["tokens"]["total"] - 1


async def test_sampled_groups_and_rewards_become_datums(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        sampled = await agent.call(
            "sample",
            **{
                "client_id": client_id,
                "prompt": "Hi",
                "num_samples": 4,
                "max_tokens": 8,
                "seed": 1,
            },
        )
        group = {"group_id": sampled["group_id"], "rewards": [1.0, 0.0, 0.0, 0.0]}
        built = await agent.call("build_datums", kind="policy_gradient", groups=[group])
        few = await agent.error(
            "build_datums",
            **{"kind": "policy_gradient", "groups": [{**group, "rewards": [1.0]}]},
        )
    assert built["base_model"] == TINY
    assert built["datums"] == 4
    assert "4 samples" in few


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "policy_gradient"}, "built from groups alone"),
        ({"groups": [{"group_id": "group-1", "rewards": [1]}]}, "groups do not go with kind=sup"),
        ({"conversations": CONVERSATIONS}, "kind=supervised needs base_model"),
        (
            {
                "base_model": TINY,
                "conversations": [PAIR],
                "kind": "preference",
                "reduction": "mean",
            },
            "DPO compares sums",
        ),
        (
            {
                **{"base_model": TINY, "conversations": [PAIR], "kind": "preference"},
                "train_on_what": "all_tokens",
            },
            "does not go with kind=preference",
        ),
        (
            {"base_model": TINY, "conversations": [PAIR], "columns": {"reply": "x"}},
            "columns maps 'reply'",
        ),
    ],
)
async def test_arguments_that_do_not_go_together_say_so(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    async with in_memory(Settings(home=tmp_path)) as agent:
        assert said in await agent.error("build_datums", **arguments)
