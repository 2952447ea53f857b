"""Write a byte-level BPE tokenizer as the files that `AutoTokenizer` loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (  # type: ignore[import-untyped]  # it ships no py.typed
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
)


@dataclass(frozen=True)
class BpeTokenizer:
    """What a byte-level BPE tokenizer consists of.

    Attributes:
        vocabulary: Token -> id; bytes written as GPT-2's printable symbols.
        merges: Pairs of tokens, the first to be merged first.
        specials: Tokens that are matched in a text as a whole, in the order of their ids.
        splits_digits: True if each digit is a token of its own.
        named: "bos_token", "eos_token", "pad_token", "unk_token" -> one of `specials`.
        chat_template: Jinja source.
        max_length: Longest input in tokens.
    """

    vocabulary: dict[str, int]
    merges: Sequence[tuple[str, str]]
    specials: Sequence[str]
    splits_digits: bool
    named: dict[str, str]
    chat_template: str
    max_length: int


def write_tokenizer(folder: Path, bpe: BpeTokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json into an existing folder."""
    _tokenizer(bpe).save(str(folder / "tokenizer.json"))
    config = {
        # The name that transformers 4 and 5 both map to "exactly what tokenizer.json says".
        "tokenizer_class": "PreTrainedTokenizerFast",
        **bpe.named,
        "additional_special_tokens": list(bpe.specials),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": bpe.max_length,
        "chat_template": bpe.chat_template,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, "utf-8")


def _tokenizer(bpe: BpeTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=bpe.vocabulary, merges=list(bpe.merges)))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if bpe.splits_digits
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in bpe.specials]
    )
    return tokenizer
