"""A random model made on the spot: for tests and demos that need speed, not sense.

A Llama of two layers whose token ids 0-255 are the bytes of the UTF-8 text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_local.weights.hub_cache import Staged, recipe_revision, write_provenance
from tinker_local.weights.tokenizer_files import BpeTokenizer, write_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

NAME = "tinker-local/tiny"
MAX_TOKENS = 4096
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258

# ChatML without a default system prompt: what the cookbook's `qwen3_instruct` renders.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

RECIPE = {"made_from": NAME, "recipe": "1"}
REVISION = recipe_revision(RECIPE)

_SEED = 0
_INITIALIZER_RANGE = 0.02
_VOCABULARY = 256 + len(SPECIALS)
_HIDDEN = 64
_INTERMEDIATE = 128
_LAYERS = 2
_HEADS = 4
_KEY_VALUE_HEADS = 2
_KEY_VALUE = _HIDDEN // _HEADS * _KEY_VALUE_HEADS

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": _VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": _INTERMEDIATE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KEY_VALUE_HEADS,
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": _INITIALIZER_RANGE,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}


def make_tiny(work: Path) -> Staged:
    """Make the model inside `work`: the same bytes each time, torch's own generator untouched."""
    from safetensors.torch import save_file

    staged = work / "tiny"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    (staged / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")
    weights = random_weights(_shapes())
    save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(staged, byte_tokenizer(SPECIALS, CHAT_TEMPLATE))
    write_provenance(staged, RECIPE)
    return Staged(staged, REVISION)


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Draw every matrix from N(0, 0.02²), in this order; biases are zeros, norms are ones."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        return torch.randn(shape, generator=generator) * _INITIALIZER_RANGE

    return {name: drawn(name, shape) for name, shape in shapes.items()}


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the name and shape of each parameter, as `LlamaForCausalLM` has them."""
    layer = {
        "input_layernorm": (_HIDDEN,),
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (_KEY_VALUE, _HIDDEN),
        "self_attn.v_proj": (_KEY_VALUE, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "post_attention_layernorm": (_HIDDEN,),
        "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
    }
    return {
        "model.embed_tokens.weight": (_VOCABULARY, _HIDDEN),
        **{
            f"model.layers.{position}.{name}.weight": shape
            for position in range(_LAYERS)
            for name, shape in layer.items()
        },
        "model.norm.weight": (_HIDDEN,),
    }


def byte_tokenizer(specials: Sequence[str], chat_template: str) -> BpeTokenizer:
    """A tokenizer whose ids 0-255 are bytes, those from 256 on `specials`: the tiny one's first."""
    symbols = _byte_symbols()
    vocabulary = {symbol: byte for byte, symbol in enumerate(symbols)}
    return BpeTokenizer(
        vocabulary=vocabulary | {token: 256 + i for i, token in enumerate(specials)},
        merges=[],
        specials=specials,
        splits_digits=False,
        named={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
        chat_template=chat_template,
        max_length=MAX_TOKENS,
    )


def _byte_symbols() -> list[str]:
    """Return GPT-2's printable symbol of each byte (openai/gpt-2, `bytes_to_unicode`)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
