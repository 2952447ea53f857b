"""The layers of a Llama-like model, taken out of transformers' modules.

Those that read the same input are joined, so that they are one matrix product. Both faster forward
passes are made of these layers: `fused`, for training and prompts, and `decoding`, for one more
token a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tinker_local.engine import kernels
from tinker_local.engine.kernels import array_of
from tinker_local.engine.lora import LoraLinear

_KNOWN = frozenset(f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))
"""Architectures of exactly these layers."""


def is_known(causal_lm: Any) -> bool:
    """Whether a model computes what these layers do."""
    config = causal_lm.config
    return (
        type(causal_lm).__name__ in _KNOWN
        and getattr(config, "sliding_window", None) is None
        and config.hidden_act == "silu"
    )


class Joined:
    """Linear layers of one input: their outputs end to end.

    Attributes:
        weight: (out, in), of which each layer's own weight becomes a part.
        bias: (out,), or None.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = tuple(layers)
        self.weight = _joined([layer.base.weight for layer in layers])
        biases = [layer.base.bias for layer in layers if layer.base.bias is not None]
        self.bias = _joined(biases) if biases else None  # all of them have one, or none
        for layer, outputs in self.parts:
            layer.base.weight = nn.Parameter(self.weight[outputs], requires_grad=False)

    @property
    def parts(self) -> Iterator[tuple[LoraLinear, slice]]:
        """Each layer, and which outputs are its own."""
        end = 0
        for layer in self.layers:
            start, end = end, end + layer.base.out_features
            yield layer, slice(start, end)


class RmsNorm:
    """A normalisation's weight and epsilon, as `kernels` take them."""

    def __init__(self, norm: Any) -> None:
        self.weight = norm.weight.detach().float().numpy()
        self.eps = np.float32(norm.variance_epsilon)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(R, H) to the same."""
        output = torch.empty_like(x)
        kernels.rms_norm(array_of(x), self.weight, self.eps, array_of(output))
        return output

    def add_gradient(self, x: torch.Tensor, gradient: torch.Tensor, output: torch.Tensor) -> None:
        """Add to `output` (R, H) the gradient of x, from that of what `__call__` returned."""
        arrays = array_of(gradient), array_of(output)
        kernels.rms_norm_gradient(array_of(x), self.weight, self.eps, *arrays)


class HeadNorms:
    """The normalisations of queries and keys, of each head by itself: Qwen3's."""

    def __init__(self, attention: Any, queries: int, key_heads: int) -> None:
        q_norm, k_norm = RmsNorm(attention.q_norm), RmsNorm(attention.k_norm)
        self._parts = ((q_norm, 0, queries), (k_norm, queries, queries + key_heads))

    def __call__(self, heads: torch.Tensor) -> None:
        """Normalise queries and keys of (R, heads, D), in place."""
        for norm, first, end in self._parts:
            kernels.rms_norm_heads(array_of(heads), first, end, norm.weight, norm.eps)

    def to_gradient(self, heads: torch.Tensor, gradient: torch.Tensor) -> None:
        """Turn the gradient of what `__call__` made of `heads` into theirs, in place."""
        arrays = array_of(heads), array_of(gradient)
        for norm, first, end in self._parts:
            kernels.rms_norm_heads_gradient(*arrays, first, end, norm.weight, norm.eps)


@dataclass(frozen=True)
class Layer:
    """A transformer layer."""

    attention_norm: RmsNorm
    qkv: Joined
    head_norms: HeadNorms | None
    output: Joined
    mlp_norm: RmsNorm
    gate_up: Joined
    down: Joined
    queries: int
    key_heads: int
    width: int  # of a head
    scale: float

    @property
    def turned(self) -> int:
        """How many heads have a position: queries and keys."""
        return self.queries + self.key_heads


class Layers:
    """A model's layers, and what comes before and after them."""

    def __init__(self, causal_lm: Any) -> None:
        """Join the layers of a model whose linear layers are wrapped."""
        decoder = causal_lm.get_decoder()
        self.embed = decoder.embed_tokens
        self.rotary = decoder.rotary_emb
        self.layers = [_layer(layer) for layer in decoder.layers]
        self.norm = decoder.norm


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    queries = attention.q_proj.base.out_features // attention.head_dim
    key_heads = attention.k_proj.base.out_features // attention.head_dim
    has_norms = hasattr(attention, "q_norm")
    return Layer(
        attention_norm=RmsNorm(layer.input_layernorm),
        qkv=Joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        head_norms=HeadNorms(attention, queries, key_heads) if has_norms else None,
        output=Joined([attention.o_proj]),
        mlp_norm=RmsNorm(layer.post_attention_layernorm),
        gate_up=Joined([mlp.gate_proj, mlp.up_proj]),
        down=Joined([mlp.down_proj]),
        queries=queries,
        key_heads=key_heads,
        width=attention.head_dim,
        scale=attention.scaling,
    )


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach() for tensor in tensors]) if len(tensors) > 1 else tensors[0]
