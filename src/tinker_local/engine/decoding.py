"""One more token for every row, on a CPU, in fewer and larger steps than transformers takes.

While sequences are drawn, a forward pass has a row or a few dozen, so that the calls themselves
and the reading of the weights cost more than the arithmetic. Here the layers that read the same
input are one product, and weights have the order in which oneDNN reads them: a step takes half
(1 row) to two thirds (32 rows) of the time of transformers' modules with the adapters around them
(bfloat16, SmolLM2-135M). The numbers are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional

from tinker_local.engine.cache import NextTokens
from tinker_local.engine.lora import Adapter, LoraLinear

_SERVED = frozenset(f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))
"""Architectures of exactly the layers computed here."""


def can_decode(causal_lm: Any, device: torch.device) -> bool:
    """Whether `Decoder` computes what this model does."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and type(causal_lm).__name__ in _SERVED
        and getattr(causal_lm.config, "sliding_window", None) is None
    )


@dataclass(frozen=True)
class _LowRank:
    """The low-rank products of a `_Joined`, as one: scale * B (A x).

    Attributes:
        a: (ranks together, in), packed.
        b: (out, ranks together), packed; each layer's B stands beside its own rows of A.
    """

    a: torch.Tensor
    b: torch.Tensor


class _Joined:
    """Linear layers of one input, joined: their outputs end to end."""

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = tuple(layers)
        self._weight = _packed(torch.cat([layer.weight for layer in layers]))
        biases = [layer.base.bias.detach() for layer in layers if layer.base.bias is not None]
        self._bias = torch.cat(biases) if biases else None  # all of them have one, or none

    def __call__(
        self, x: torch.Tensor, low_rank: _LowRank | None, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(R, in) to (R, out); `added` (R, out) is added to it."""
        output = _product(x, self._weight, self._bias, added)
        if low_rank is None:
            return output
        return _product(_product(x, low_rank.a), low_rank.b, added=output)

    def low_rank(self, adapter: Adapter, paths: Mapping[int, str]) -> _LowRank | None:
        """An adapter's part; None if it leaves these layers alone."""
        found = [adapter.factors.get(paths.get(id(layer), "")) for layer in self.layers]
        present = [factors for factors in found if factors is not None]
        if not present:
            return None
        sizes = [layer.base.out_features for layer in self.layers]
        ranks = sum(len(factors.a) for factors in present)
        b = present[0].b.new_zeros(sum(sizes), ranks)
        row = column = 0
        for factors, size in zip(found, sizes, strict=True):
            if factors is not None:
                rank = len(factors.a)
                b[row : row + size, column : column + rank] = factors.b * adapter.scale
                column += rank
            row += size
        dtype = self.layers[0].weight.dtype
        a = torch.cat([factors.a for factors in present])
        return _LowRank(_packed(a.to(dtype)), _packed(b.to(dtype)))


@dataclass(frozen=True)
class _Layer:
    """A transformer layer. The normalisations of queries and keys are Qwen3's alone."""

    attention_norm: Callable[[torch.Tensor], torch.Tensor]
    qkv: _Joined
    q_norm: Callable[[torch.Tensor], torch.Tensor] | None
    k_norm: Callable[[torch.Tensor], torch.Tensor] | None
    output: _Joined
    mlp_norm: Callable[[torch.Tensor], torch.Tensor]
    gate_up: _Joined
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: _Joined
    scale: float


@dataclass(frozen=True)
class DecodingAdapter:
    """An adapter in the form that `Decoder` reads, by the place of each `_Joined`."""

    low_ranks: Sequence[_LowRank | None]


class Decoder:
    """A base model's weights, joined and packed: a copy of them."""

    def __init__(self, causal_lm: Any, layers: Mapping[str, LoraLinear], head: LoraLinear) -> None:
        decoder = causal_lm.get_decoder()
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._paths = {id(layer): path for path, layer in layers.items()}
        self._layers = [_layer(layer) for layer in decoder.layers]
        self._norm = _rms_norm(decoder.norm)
        self._head = _Joined([head])
        self._width = decoder.layers[0].self_attn.head_dim

    def prepared(self, adapter: Adapter | None) -> DecodingAdapter:
        """An adapter's factors, joined and packed: a copy of them."""
        joined = [
            *(part for layer in self._layers for part in _parts(layer)),
            self._head,
        ]
        if adapter is None:
            return DecodingAdapter([None] * len(joined))
        return DecodingAdapter([part.low_rank(adapter, self._paths) for part in joined])

    def logits(
        self, tokens: torch.Tensor, layout: NextTokens, adapter: DecodingAdapter
    ) -> torch.Tensor:
        """Scores (R, vocabulary) of what follows, float32, after one more token (R,) a row."""
        hidden = self._embed(tokens)  # (R, H)
        cos, sin = self._rotary(hidden, layout.positions.unsqueeze(0))  # (1, R, D) each
        turn = _Turn(cos[0].unsqueeze(1), sin[0].unsqueeze(1))
        for index, layer in enumerate(self._layers):
            parts = adapter.low_ranks[4 * index : 4 * index + 4]
            hidden = self._after(layer, index, hidden, turn, layout, parts)
        return self._head(self._norm(hidden), adapter.low_ranks[-1]).float()

    def _after(
        self,
        layer: _Layer,
        index: int,
        hidden: torch.Tensor,
        turn: _Turn,
        layout: NextTokens,
        low_ranks: Sequence[_LowRank | None],
    ) -> torch.Tensor:
        """Hidden states (R, H) after one layer."""
        heads = layer.qkv(layer.attention_norm(hidden), low_ranks[0])
        heads = heads.view(len(hidden), -1, self._width)  # (R, heads + 2 * key-value heads, D)
        values = (heads.shape[1] - layer.output.layers[0].base.in_features // self._width) // 2
        rotated, v = heads[:, :-values], heads[:, -values:]
        if layer.q_norm is not None and layer.k_norm is not None:
            rotated = torch.cat(
                [layer.q_norm(rotated[:, :-values]), layer.k_norm(rotated[:, -values:])], dim=1
            )
        rotated = turn(rotated)
        q, k = rotated[:, :-values], rotated[:, -values:]
        seen = layout.attend_rows(index, q, k, v, layer.scale).flatten(1)
        hidden = layer.output(seen, low_ranks[1], hidden)
        gate, up = layer.gate_up(layer.mlp_norm(hidden), low_ranks[2]).chunk(2, dim=1)
        return layer.down(layer.activation(gate) * up, low_ranks[3], hidden)


class _Turn:
    """Rotary position embedding of one token a row (Su 2021, RoFormer, in transformers' form)."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Take (R, 1, D) each."""
        self._half = sin.shape[-1] // 2
        self._cos = cos
        self._sin = torch.cat([-sin[..., : self._half], sin[..., self._half :]], dim=-1)

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        return heads * self._cos + heads.roll(self._half, -1) * self._sin


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return _Layer(
        attention_norm=_rms_norm(layer.input_layernorm),
        qkv=_Joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm=q_norm and _rms_norm(q_norm),
        k_norm=k_norm and _rms_norm(k_norm),
        output=_Joined([attention.o_proj]),
        mlp_norm=_rms_norm(layer.post_attention_layernorm),
        gate_up=_Joined([mlp.gate_proj, mlp.up_proj]),
        activation=mlp.act_fn,
        down=_Joined([mlp.down_proj]),
        scale=attention.scaling,
    )


def _parts(layer: _Layer) -> tuple[_Joined, ...]:
    """In the order in which `DecodingAdapter` holds them."""
    return layer.qkv, layer.output, layer.gate_up, layer.down


def _rms_norm(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, eps = norm.weight, norm.variance_epsilon
    return lambda x: functional.rms_norm(x, weight.shape, weight, eps)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """A copy in oneDNN's order, which it otherwise brings a weight into at every product."""
    rows = 64  # a hint: the order is the same for 1 to 64
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return cast("torch.Tensor", reordered)


def _product(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias + added."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    if added is None:
        return cast("torch.Tensor", pointwise(x, packed, bias, "none", [], ""))
    return cast("torch.Tensor", pointwise.binary(x, added, packed, bias, "add"))
