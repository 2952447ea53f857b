"""The tokenizer rebuilt from GGUF, against ids that llama.cpp 0.3.36 gave for the same file."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_local.weights import ModelFiles

# Written by llama_cpp.Llama(gguf, vocab_only=True).tokenize(text, add_bos=False, special=True).
# fmt: off
LLAMA_CPP_IDS = [
    ("Hello, world!", [19556, 28, 905, 17]),
    ("The quick brown fox jumps over the lazy dog.",
     [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30]),
    ("In 1969, 3.14159 x 2 = 6.28318",
     [788, 216, 33, 41, 38, 41, 28, 216, 35, 30, 33, 36, 33, 37, 41, 1792, 216, 34, 446, 216,
      38, 30, 34, 40, 35, 33, 40]),
    ("  two leading spaces", [216, 827, 2899, 5600]),
    ("trailing space ", [4861, 4966, 1898, 216]),
    ("a\n\nb\n\n\nc\td", [81, 198, 198, 82, 1116, 198, 83, 197, 84]),
    ("def f(x: int) -> int:\n    return x ** 2\n",
     [1604, 275, 24, 104, 42, 464, 25, 4722, 464, 42, 472, 1003, 1792, 1903, 216, 34, 198]),
    ("Grüße aus Köln, ça va?",
     [27302, 7170, 34878, 85, 253, 376, 659, 7466, 34115, 28, 5549, 117, 81, 46316, 47]),
    ("日本語のテキスト",
     [23274, 115, 40993, 179, 120, 248, 26453, 11100, 224, 10391, 251, 10391, 134, 11100, 226]),
    ("👋🏽 family: 👨\u200d👩\u200d👧",
     [10813, 235, 229, 10813, 233, 138, 1564, 42, 15107, 235, 118, 321, 231, 10813, 235, 119,
      321, 231, 10813, 235, 117]),
    ("don't we'll I'M", [12420, 982, 392, 3060, 339, 23, 61]),
    ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
    ("<|endoftext|><repo_name>x<jupyter_code>", [0, 3, 104, 13]),
    ("x\r\n\u00a0y\u2028z", [104, 2738, 15442, 105, 321, 118, 106]),
    ("https://example.org/a_b?c=1&d=%20",
     [4687, 1742, 7434, 30, 2295, 31, 81, 79, 82, 47, 83, 45, 33, 22, 84, 23446, 34, 32]),
    ("مرحبا بالعالم", [21706, 20602, 44626, 31462, 10805, 45726, 22208, 34966, 22208, 21706]),
    ("٣ ½ ² Ⅷ 10", [164, 113, 216, 16738, 216, 19133, 216, 173, 223, 117, 216, 33, 32]),
    ("", []),
    ("SolidGoldMagikarp antidisestablishmentarianism",
     [46939, 22090, 33648, 1873, 5392, 1598, 17889, 30834, 358, 35050]),
    ("a<|im_end|>b", [81, 2, 82]),
    ("A    B\n \n  C", [49, 333, 389, 198, 3717, 216, 340]),
]
# fmt: on

# The vocabulary has no token for these bytes: six control characters, and the first byte of
# U+40000 to U+BFFFF, where nothing is assigned. They vanish, as in the original tokenizer.
BYTES_WITHOUT_TOKEN = "\x04\x06\x13\x14\x16\x1d"

encodable_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x3FFFF)),
    st.text(st.characters(exclude_categories=["Cs"], min_codepoint=0xC0000)),
).map(lambda text: text.translate(dict.fromkeys(map(ord, BYTES_WITHOUT_TOKEN))))


@pytest.fixture(scope="module")
def tokenizer(smollm2: ModelFiles) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.folder, local_files_only=True)


@pytest.mark.parametrize(("text", "ids"), LLAMA_CPP_IDS)
def test_a_text_gets_the_ids_that_llama_cpp_gives_it(
    tokenizer: Any, text: str, ids: list[int]
) -> None:
    assert tokenizer.encode(text) == ids


@settings(max_examples=300, deadline=None, database=None)
@given(text=encodable_text)
def test_any_text_survives_encoding_and_decoding(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_spaces_before_punctuation_are_not_cleaned_up(tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer.encode("a , b . do n't")) == "a , b . do n't"


def test_a_character_without_a_token_vanishes(tokenizer: Any) -> None:
    assert tokenizer.encode(BYTES_WITHOUT_TOKEN) == []


def test_there_are_49152_tokens_of_which_17_are_special(tokenizer: Any) -> None:
    assert len(tokenizer) == 49152
    assert sorted(tokenizer.all_special_ids) == list(range(17))


def test_the_named_tokens_are_those_of_chatml(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)


def test_nothing_is_put_around_a_text(tokenizer: Any) -> None:
    assert tokenizer.encode("Hi", add_special_tokens=True) == [26843]
