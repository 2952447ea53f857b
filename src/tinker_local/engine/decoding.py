"""One more token for every row, on a CPU, in fewer and larger steps than transformers takes.

While sequences are drawn, a forward pass has a row or a few dozen, so that the calls themselves
and the reading of the weights cost more than the arithmetic. Here the layers that read the same
input are one product, and weights have the order in which oneDNN reads them: a step takes half
(1 row) to two thirds (32 rows) of the time of transformers' modules with the adapters around them
(bfloat16, SmolLM2-135M). The numbers are the same up to rounding. Prompts are read by the same
layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from tinker_local.engine.lora import Adapter, LoraLinear

_linear = torch.ops.mkldnn._linear_pointwise

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


class Rows(Protocol):
    """Which token may see which, for R tokens; `attention.Layout` with the rows first."""

    @property
    def positions(self) -> torch.Tensor:
        """Place of each token in its own sequence, (R,), int64."""

    def attend_rows(
        self, layer: int, heads: torch.Tensor, key_heads: int, scale: float
    ) -> torch.Tensor:
        """See `next_tokens.NextTokens.attend_rows`."""


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

    @property
    def joined(self) -> tuple[_Joined, ...]:
        return self.qkv, self.output, self.gate_up, self.down


class Decoder:
    """A base model's weights, joined and packed: a copy of them."""

    def __init__(self, causal_lm: Any, layers: Mapping[str, LoraLinear], head: LoraLinear) -> None:
        decoder = causal_lm.get_decoder()
        self.embed = decoder.embed_tokens
        self.rotary = decoder.rotary_emb
        self.layers = [_layer(layer) for layer in decoder.layers]
        self.norm = _rms_norm(decoder.norm)
        self.head = _Joined([head])
        attention = decoder.layers[0].self_attn
        self.width = attention.head_dim
        self.heads = attention.q_proj.base.out_features // self.width
        self.key_heads = attention.k_proj.base.out_features // self.width
        self._paths = {id(layer): path for path, layer in layers.items()}

    def adapted(self, adapter: Adapter | None) -> AdaptedDecoder:
        """This model under an adapter, whose factors are joined and packed: a copy of them."""

        def low_rank(joined: _Joined) -> _LowRank | None:
            return joined.low_rank(adapter, self._paths) if adapter else None

        parts = [[low_rank(joined) for joined in layer.joined] for layer in self.layers]
        return AdaptedDecoder(self, parts, low_rank(self.head))


class AdaptedDecoder:
    """What `BaseModel` computes while an adapter is active, without gradients."""

    device = torch.device("cpu")

    def __init__(
        self,
        decoder: Decoder,
        low_ranks: Sequence[Sequence[_LowRank | None]],
        head_low_rank: _LowRank | None,
    ) -> None:
        """Take the low-rank products by layer, in the order of `_Layer.joined`."""
        self._decoder = decoder
        self._low_ranks = low_ranks
        self._head_low_rank = head_low_rank

    def hidden_states(self, tokens: torch.Tensor, layout: Rows) -> torch.Tensor:
        """Last hidden states (R, H) of tokens (R,) laid out by `layout`."""
        hidden = self._decoder.embed(tokens)  # (R, H)
        cos, sin = self._decoder.rotary(hidden, layout.positions.unsqueeze(0))  # (1, R, D) each
        turn = _Turn(cos[0], sin[0], self._decoder.heads, self._decoder.key_heads)
        for index in range(len(self._low_ranks)):
            hidden = self._after(index, hidden, turn, layout)
        return self._decoder.norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores (R, vocabulary) of the next token, float32, from hidden states (R, H)."""
        return self._decoder.head(hidden, self._head_low_rank).float()

    def _after(self, index: int, hidden: torch.Tensor, turn: _Turn, layout: Rows) -> torch.Tensor:
        """Hidden states (R, H) after one layer."""
        layer, low_ranks = self._decoder.layers[index], self._low_ranks[index]
        key_heads, width = self._decoder.key_heads, self._decoder.width
        heads = layer.qkv(layer.attention_norm(hidden), low_ranks[0])
        heads = heads.view(len(hidden), -1, width)  # (R, heads + 2 * key-value heads, D)
        if layer.q_norm is not None and layer.k_norm is not None:
            sizes = [self._decoder.heads, key_heads, key_heads]
            q, k, v = torch.split(heads, sizes, dim=1)
            heads = torch.cat([layer.q_norm(q), layer.k_norm(k), v], dim=1)
        seen = layout.attend_rows(index, turn(heads), key_heads, layer.scale)
        hidden = layer.output(seen.flatten(1), low_ranks[1], hidden)
        gate, up = layer.gate_up(layer.mlp_norm(hidden), low_ranks[2]).chunk(2, dim=1)
        return layer.down(layer.activation(gate).mul_(up), low_ranks[3], hidden)


class _Turn:
    """Rotary position embedding of one token a row (Su 2021, RoFormer, in transformers' form)."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, heads: int, key_heads: int) -> None:
        """Take (R, D) each; values are turned by nothing, so that all heads are one tensor."""
        rows, width = cos.shape
        self._half = width // 2
        shape = (rows, heads + 2 * key_heads, width)
        self._cos, self._sin = cos.new_ones(shape), cos.new_zeros(shape)
        self._cos[:, :-key_heads] = cos.unsqueeze(1)
        self._sin[:, :-key_heads, : self._half] = -sin[:, None, : self._half]
        self._sin[:, :-key_heads, self._half :] = sin[:, None, self._half :]

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        # Rounded after each step, as in training: in one step, sampler and training forward were
        # half as far again from each other.
        return (heads * self._cos).add_(heads.roll(self._half, -1).mul_(self._sin))


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


def _rms_norm(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, in float32.

    From the vector's norm, sqrt(sum(x^2)), it takes 6 calls; functional.rms_norm makes 9.
    """
    size, dtype = norm.weight.numel(), norm.weight.dtype
    weight = norm.weight.float() * math.sqrt(size)
    eps = torch.tensor(math.sqrt(size * norm.variance_epsilon))

    def normalized(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        length: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (wide / length.hypot_(eps)).mul_(weight).to(dtype)

    return normalized


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
    # An overload by its name is called in 3 us less than the operator that looks for it.
    if added is None:
        return cast("torch.Tensor", _linear.default(x, packed, bias, "none", [], ""))
    return cast("torch.Tensor", _linear.binary(x, added, packed, bias, "add"))
