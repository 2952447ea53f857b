"""A random vision-language model made on the spot: `tiny` with eyes.

A Qwen3-VL of two vision layers and two text layers, 0.2 million parameters; the tokenizer is that
of `tiny` with the tokens that stand around an image and for it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tinker_local.weights.hub_cache import Staged, recipe_revision, write_provenance
from tinker_local.weights.model_folder import IMAGE_PROCESSOR_FILE
from tinker_local.weights.tiny import MAX_TOKENS, byte_tokenizer, random_weights
from tinker_local.weights.tiny import SPECIALS as TEXT_SPECIALS
from tinker_local.weights.tokenizer_files import write_tokenizer

NAME = "tinker-local/tiny-vl"
SPECIALS = (  # ids 256 to 262
    *TEXT_SPECIALS,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# ChatML without a default system prompt: what the cookbook's `qwen3_vl_instruct` renders.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

RECIPE = {"made_from": NAME, "recipe": "1"}
REVISION = recipe_revision(RECIPE)

_VOCABULARY = 256 + len(SPECIALS)
_HIDDEN = 64
_INTERMEDIATE = 128
_LAYERS = 2
_HEADS = 4
_KEY_VALUE_HEADS = 2
_HEAD = _HIDDEN // _HEADS

_PATCH = 16  # pixels a side
_MERGE = 2  # patches a side that become one token, so that one has 32 x 32 pixels
_FRAMES = 2  # of a patch: an image is shown twice
_VISION_HIDDEN = 32
_VISION_INTERMEDIATE = 64
_VISION_LAYERS = 2
_PLACES = 64  # learned positions, 8 x 8, stretched over an image
_MERGED = _VISION_HIDDEN * _MERGE**2

CONFIG = {
    "model_type": "qwen3_vl",
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "dtype": "float32",
    "tie_word_embeddings": True,
    "image_token_id": 256 + SPECIALS.index("<|image_pad|>"),
    "video_token_id": 256 + SPECIALS.index("<|video_pad|>"),
    "vision_start_token_id": 256 + SPECIALS.index("<|vision_start|>"),
    "vision_end_token_id": 256 + SPECIALS.index("<|vision_end|>"),
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": _VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_VALUE_HEADS,
        "head_dim": _HEAD,
        "max_position_embeddings": MAX_TOKENS,
        "tie_word_embeddings": True,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],  # of half a head: time, height, width
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": _VISION_LAYERS,
        "hidden_size": _VISION_HIDDEN,
        "intermediate_size": _VISION_INTERMEDIATE,
        "num_heads": 2,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": _FRAMES,
        "out_hidden_size": _HIDDEN,
        "num_position_embeddings": _PLACES,
        "deepstack_visual_indexes": [0],
    },
}

IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": _PATCH,
    "temporal_patch_size": _FRAMES,
    "merge_size": _MERGE,
    # Pixels of an image after scaling: 1 to 64 tokens.
    "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def make_tiny_vl(work: Path) -> Staged:
    """Make the model inside `work`: the same bytes each time, torch's own generator untouched."""
    from safetensors.torch import save_file

    staged = work / "tiny-vl"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for name, content in (("config.json", CONFIG), (IMAGE_PROCESSOR_FILE, IMAGE_PROCESSOR)):
        (staged / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    weights = random_weights({**_vision_shapes(), **_text_shapes()})
    save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(staged, byte_tokenizer(SPECIALS, CHAT_TEMPLATE))
    write_provenance(staged, RECIPE)
    return Staged(staged, REVISION)


def _vision_shapes() -> dict[str, tuple[int, ...]]:
    """The name and shape of each parameter of `Qwen3VLVisionModel`."""
    width, between = _VISION_HIDDEN, _VISION_INTERMEDIATE
    layer = {
        **{f"{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in _NORM},
        **_linear("attn.qkv", width, 3 * width),
        **_linear("attn.proj", width, width),
        **_linear("mlp.linear_fc1", width, between),
        **_linear("mlp.linear_fc2", between, width),
    }
    to_text = {
        **_linear("linear_fc1", _MERGED, _MERGED),
        **_linear("linear_fc2", _MERGED, _HIDDEN),
    }
    return _under(
        "model.visual",
        {
            "patch_embed.proj.weight": (width, 3, _FRAMES, _PATCH, _PATCH),
            "patch_embed.proj.bias": (width,),
            "pos_embed.weight": (_PLACES, width),
            **{
                name: shape
                for place in range(_VISION_LAYERS)
                for name, shape in _under(f"blocks.{place}", layer).items()
            },
            **_under("merger", {f"norm.{part}": (width,) for part in _NORM} | to_text),
            **_under(
                "deepstack_merger_list.0", {f"norm.{part}": (_MERGED,) for part in _NORM} | to_text
            ),
        },
    )


def _text_shapes() -> dict[str, tuple[int, ...]]:
    """The name and shape of each parameter of `Qwen3VLTextModel`."""
    key_values = _KEY_VALUE_HEADS * _HEAD
    layer = {
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (key_values, _HIDDEN),
        "self_attn.v_proj": (key_values, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "self_attn.q_norm": (_HEAD,),
        "self_attn.k_norm": (_HEAD,),
        "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
        "input_layernorm": (_HIDDEN,),
        "post_attention_layernorm": (_HIDDEN,),
    }
    return _under(
        "model.language_model",
        {
            "embed_tokens.weight": (_VOCABULARY, _HIDDEN),
            **{
                f"layers.{place}.{name}.weight": shape
                for place in range(_LAYERS)
                for name, shape in layer.items()
            },
            "norm.weight": (_HIDDEN,),
        },
    )


_NORM = ("weight", "bias")


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _under(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
