"""One more token for every row, on a CPU, in fewer and larger steps than transformers takes.

While sequences are drawn, a forward pass has a row or a few dozen, so that the calls themselves
and the reading of the weights cost more than the arithmetic. Here the layers that read the same
input are one product, weights have the order in which oneDNN reads them, and what lies between the
products is compiled (`kernels`): a step takes two fifths (1 row), half (8) to two thirds (32 rows)
of the time of transformers' modules with the adapters around them (bfloat16, SmolLM2-135M). The
numbers are the same up to rounding. Prompts are read by the same layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch

from tinker_local.engine import kernels
from tinker_local.engine.kernels import array_of
from tinker_local.engine.lora import Adapter, LoraLinear

_linear = torch.ops.mkldnn._linear_pointwise

Array = np.ndarray[Any, Any]

_SERVED = frozenset(f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))
"""Architectures of exactly the layers computed here."""


def can_decode(causal_lm: Any, device: torch.device) -> bool:
    """Whether `Decoder` computes what this model does."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and type(causal_lm).__name__ in _SERVED
        and getattr(causal_lm.config, "sliding_window", None) is None
        and causal_lm.config.hidden_act == "silu"
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


class _LowRank:
    """The low-rank products of a `_Joined`: scale * B A x of each layer."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, sizes: Sequence[int]) -> None:
        """Take what `kernels.add_low_rank` does, as tensors; `b` has the scale in it."""
        self._arrays = (array_of(a), array_of(b), np.array(sizes))

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Add the products of x (R, in) to `output` (R, out), in place."""
        kernels.add_low_rank(array_of(x.contiguous()), *self._arrays, array_of(output))


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
        if low_rank is not None:
            low_rank.add(x, output)
        return output

    def low_rank(self, adapter: Adapter, paths: Mapping[int, str]) -> _LowRank | None:
        """An adapter's part; None if it leaves these layers alone."""
        found = [adapter.factors.get(paths.get(id(layer), "")) for layer in self.layers]
        if not any(found):
            return None
        rank, dtype = adapter.spec.rank, self.layers[0].weight.dtype
        sizes = [layer.base.out_features for layer in self.layers]
        a = torch.zeros(len(found) * rank, self.layers[0].base.in_features, dtype=dtype)
        b = torch.zeros(rank, sum(sizes), dtype=dtype)
        start = 0
        for index, (factors, size) in enumerate(zip(found, sizes, strict=True)):
            if factors is not None:
                a[index * rank : (index + 1) * rank] = factors.a.detach()
                b[:, start : start + size] = (factors.b.detach() * adapter.scale).t()
            start += size
        return _LowRank(a, b, sizes)


class _RmsNorm:
    """A normalisation's weight and epsilon, as `kernels` take them."""

    def __init__(self, norm: Any) -> None:
        self.weight = norm.weight.detach().float().numpy()
        self.eps = np.float32(norm.variance_epsilon)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(R, H) to the same."""
        output = torch.empty_like(x)
        kernels.rms_norm(array_of(x), self.weight, self.eps, array_of(output))
        return output


@dataclass(frozen=True)
class _Layer:
    """A transformer layer. The normalisations of queries and keys are Qwen3's alone."""

    attention_norm: _RmsNorm
    qkv: _Joined
    q_norm: _RmsNorm | None
    k_norm: _RmsNorm | None
    output: _Joined
    mlp_norm: _RmsNorm
    gate_up: _Joined
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
        self.norm = _RmsNorm(decoder.norm)
        self.head = _Joined([head])
        attention = decoder.layers[0].self_attn
        self.width = attention.head_dim
        self.heads = attention.q_proj.base.out_features // self.width
        self.key_heads = attention.k_proj.base.out_features // self.width
        self._paths = {id(layer): path for path, layer in layers.items()}

    def adapted(self, adapter: Adapter | None) -> AdaptedDecoder:
        """This model under an adapter, whose factors are joined: a copy of them."""

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
        turn = (array_of(cos[0]), array_of(sin[0]))
        for index in range(len(self._low_ranks)):
            hidden = self._after(index, hidden, turn, layout)
        return self._decoder.norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores (R, vocabulary) of the next token, float32, from hidden states (R, H)."""
        return self._decoder.head(hidden, self._head_low_rank).float()

    def _after(
        self, index: int, hidden: torch.Tensor, turn: tuple[Array, Array], layout: Rows
    ) -> torch.Tensor:
        """Hidden states (R, H) after one layer; `turn` is what `kernels.turn` takes."""
        layer, low_ranks = self._decoder.layers[index], self._low_ranks[index]
        heads = layer.qkv(layer.attention_norm(hidden), low_ranks[0])
        heads = heads.view(len(hidden), -1, self._decoder.width)
        self._prepare(array_of(heads), layer, turn)
        seen = layout.attend_rows(index, heads, self._decoder.key_heads, layer.scale)
        hidden = layer.output(seen.flatten(1), low_ranks[1], hidden)
        gate_up = layer.gate_up(layer.mlp_norm(hidden), low_ranks[2])  # (R, 2 * I)
        product = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        kernels.silu_product(array_of(gate_up), array_of(product))
        return layer.down(product, low_ranks[3], hidden)

    def _prepare(self, heads: Array, layer: _Layer, turn: tuple[Array, Array]) -> None:
        """Normalise where Qwen3 does, and turn, queries and keys of (R, heads, D), in place."""
        queries = self._decoder.heads
        end = queries + self._decoder.key_heads
        if layer.q_norm is not None and layer.k_norm is not None:
            kernels.rms_norm_heads(heads, 0, queries, layer.q_norm.weight, layer.q_norm.eps)
            kernels.rms_norm_heads(heads, queries, end, layer.k_norm.weight, layer.k_norm.eps)
        kernels.turn(heads, *turn, end)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return _Layer(
        attention_norm=_RmsNorm(layer.input_layernorm),
        qkv=_Joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm=q_norm and _RmsNorm(q_norm),
        k_norm=k_norm and _RmsNorm(k_norm),
        output=_Joined([attention.o_proj]),
        mlp_norm=_RmsNorm(layer.post_attention_layernorm),
        gate_up=_Joined([mlp.gate_proj, mlp.up_proj]),
        down=_Joined([mlp.down_proj]),
        scale=attention.scaling,
    )


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
