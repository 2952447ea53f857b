"""Rebuild the tokenizer of SmolLM2 from the metadata of a GGUF file.

transformers 5.5.4 can load a GGUF tokenizer too, but takes this one for CodeLlama's: spaces and
newlines become <|endoftext|>, ids exceed the vocabulary, eos is <|im_start|>.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType

from tinker_local.weights.tokenizer_files import BpeTokenizer

# (model, pre-tokenizer) as llama.cpp names them -> does each digit stand alone?
# (llama-vocab.cpp; "gpt2" is byte-level BPE)
_SPLITS_DIGITS = {("gpt2", "smollm"): True}

_ID_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}


def read_tokenizer(gguf_file: Path) -> BpeTokenizer:
    """Read vocabulary, merges, special tokens and chat template out of a GGUF file."""
    reader = GGUFReader(gguf_file)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    tokens: list[str] = value("tokenizer.ggml.tokens")
    kinds: list[int] = value("tokenizer.ggml.token_type")
    architecture = value("general.architecture")
    return BpeTokenizer(
        vocabulary={token: position for position, token in enumerate(tokens)},
        merges=[_pair(merge) for merge in value("tokenizer.ggml.merges")],
        specials=[
            token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL
        ],
        splits_digits=_SPLITS_DIGITS[value("tokenizer.ggml.model"), value("tokenizer.ggml.pre")],
        named={name: tokens[value(key)] for name, key in _ID_KEYS.items()},
        chat_template=value("tokenizer.chat_template"),
        max_length=value(f"{architecture}.context_length"),
    )


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right
