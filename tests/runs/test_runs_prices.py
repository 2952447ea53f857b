"""What a million tokens cost, and who says so."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import pytest

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import prices


def test_the_snapshot_has_its_source_and_its_date(tmp_path: Path) -> None:
    price = prices.price("Qwen/Qwen3-8B", tmp_path)
    assert price is not None
    assert (price.prefill, price.sample, price.train) == (0.195, 0.60, 0.44)
    assert price.source == "https://tinker-docs.thinkingmachines.ai/tinker/models.json"
    assert price.date == "2026-10"
    assert price.derived == ()


def test_cached_prompt_tokens_cost_a_fifth(tmp_path: Path) -> None:
    price = prices.price("Qwen/Qwen3-8B", tmp_path)
    assert price is not None
    assert price.cached_prefill == pytest.approx(0.2 * 0.195)


def test_a_derived_price_says_so_and_how_high_it_may_be(tmp_path: Path) -> None:
    price = prices.price("openai/gpt-oss-20b", tmp_path)
    assert price is not None
    assert price.derived == ("train",)
    assert price.train_at_most == pytest.approx(1.37 * 0.396)
    confirmed = prices.price("thinkingmachines/Inkling", tmp_path)
    assert confirmed is not None
    assert confirmed.train_at_most == confirmed.train == 5.61


@pytest.mark.parametrize("name", ["nobody/no-such-model", "Qwen/Qwen3-8B:peft:262144"])
def test_a_model_or_variant_that_nobody_priced_is_unknown(name: str, tmp_path: Path) -> None:
    assert prices.price(name, tmp_path) is None


def test_the_users_own_price_comes_first_with_the_day_it_was_written(tmp_path: Path) -> None:
    own = tmp_path / "prices.json"
    own.write_text(json.dumps({"Qwen/Qwen3-8B": {"train": 0}}))
    written = datetime.datetime(2026, 11, 2, 12, tzinfo=datetime.UTC).timestamp()
    os.utime(own, (written, written))
    price = prices.price("Qwen/Qwen3-8B", tmp_path)
    assert price == prices.Price(0, str(own), "2026-11-02", train_at_most=0)
    assert prices.price("Qwen/Qwen3.5-4B", tmp_path) is not None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "Invalid JSON"),
        ('{"a/b": {"prefill": 1}}', "a/b.train: Field required"),
        ('{"a/b": {"train": -1}}', "a/b.train: Input should be greater than or equal to 0"),
        ('{"a/b": 0.4}', "a/b: "),
    ],
)
def test_a_users_file_that_is_wrong_names_the_place(
    content: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / "prices.json").write_text(content)
    with pytest.raises(InvalidInputError) as refused:
        prices.price("a/b", tmp_path)
    assert str(tmp_path / "prices.json") in str(refused.value)
    assert what in str(refused.value)
