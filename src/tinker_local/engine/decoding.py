"""One more token for every row, on a CPU, in fewer and larger steps than transformers takes.

While sequences are drawn, a forward pass has a row or a few dozen, so that the calls themselves
and the reading of the weights cost more than the arithmetic. Here the layers that read the same
input are one product, weights have the order in which oneDNN reads them, and what lies between the
products is compiled (`kernels`): a step takes two fifths (1 row), half (8) to two thirds (32 rows)
of the time of transformers' modules with the adapters around them (bfloat16, SmolLM2-135M). The
numbers are the same up to rounding. Prompts are read by the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional

from tinker_local.engine import kernels
from tinker_local.engine.attention import Layout
from tinker_local.engine.kernels import array_of
from tinker_local.engine.layers import Joined, Layer, Layers, RmsNorm
from tinker_local.engine.lora import Adapter, LoraLinear
from tinker_local.engine.next_tokens import NextTokens

_linear = torch.ops.mkldnn._linear_pointwise

Array = np.ndarray[Any, Any]


def can_decode() -> bool:
    """Whether oneDNN, which `Decoder` calls, is in this torch."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


class _LowRank:
    """The low-rank products of a `_Packed`: scale * B A x of each layer."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, sizes: Sequence[int]) -> None:
        """Take what `kernels.add_low_rank` does, as tensors; `b` has the scale in it."""
        self._a = a
        self._bs = torch.split(b, list(sizes), dim=1)
        self._arrays = (array_of(a), array_of(b), np.array(sizes))

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Add the products of x (R, in) to `output` (R, out), in place, for few rows.

        A row comes out the same whatever is beside it.
        """
        kernels.add_low_rank(array_of(x.contiguous()), *self._arrays, array_of(output))

    def add_to_prompt(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """The same for many rows: 1,000 tokens are read in 0.85 of the time."""
        lows = functional.linear(x, self._a).chunk(len(self._bs), dim=1)  # (R, rank) each
        start = 0
        for low, b in zip(lows, self._bs, strict=True):
            output.narrow(1, start, b.shape[1]).addmm_(low, b)
            start += b.shape[1]


_Add = Callable[[torch.Tensor, torch.Tensor], None]
"""`_LowRank.add` or `add_to_prompt`."""


class _Packed:
    """Joined layers, their weight in oneDNN's order."""

    def __init__(self, joined: Joined) -> None:
        self._joined = joined
        self._weight = _reordered(joined.weight)

    def __call__(
        self, x: torch.Tensor, add: _Add | None, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(R, in) to (R, out), with low-rank products; `added` (R, out) is added to it."""
        output = _product(x, self._weight, self._joined.bias, added)
        if add is not None:
            add(x, output)
        return output

    def low_rank(self, adapter: Adapter, paths: Mapping[int, str]) -> _LowRank | None:
        """An adapter's part; None if it leaves these layers alone."""
        layers = self._joined.layers
        found = [adapter.factors.get(paths.get(id(layer), "")) for layer in layers]
        if not any(found):
            return None
        rank, dtype = adapter.spec.rank, self._joined.weight.dtype
        outputs, inputs = self._joined.weight.shape
        a = torch.zeros(len(found) * rank, inputs, dtype=dtype)
        b = torch.zeros(rank, outputs, dtype=dtype)
        for index, (factors, (_, own)) in enumerate(zip(found, self._joined.parts, strict=True)):
            if factors is not None:
                a[index * rank : (index + 1) * rank] = factors.a.detach()
                b[:, own] = (factors.b.detach() * adapter.scale).t()
        sizes = [layer.base.out_features for layer in layers]
        return _LowRank(a, b, sizes)


@dataclass(frozen=True)
class _Layer:
    """A transformer layer, and its weights in oneDNN's order."""

    layer: Layer
    qkv: _Packed
    output: _Packed
    gate_up: _Packed
    down: _Packed

    @property
    def packed(self) -> tuple[_Packed, ...]:
        return self.qkv, self.output, self.gate_up, self.down


class Decoder:
    """A base model's weights, joined and packed: a copy of them."""

    def __init__(self, layers: Layers, head: LoraLinear, paths: Mapping[str, LoraLinear]) -> None:
        """Take a model's layers and head, and its adaptable layers by dotted path."""
        self.embed = layers.embed
        self.rotary = layers.rotary
        self.layers = [_packed(layer) for layer in layers.layers]
        self.norm = RmsNorm(layers.norm)
        self.head = _Packed(Joined([head]))
        self._paths = {id(layer): path for path, layer in paths.items()}

    def adapted(self, adapter: Adapter | None) -> AdaptedDecoder:
        """This model under an adapter, whose factors are joined: a copy of them."""

        def low_rank(packed: _Packed) -> _LowRank | None:
            return packed.low_rank(adapter, self._paths) if adapter else None

        parts = [[low_rank(packed) for packed in layer.packed] for layer in self.layers]
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
        """Take the low-rank products by layer, in the order of `_Layer.packed`."""
        self._decoder = decoder
        self._adds = [[some.add if some else None for some in layer] for layer in low_ranks]
        self._adds_to_prompt = [
            [some.add_to_prompt if some else None for some in layer] for layer in low_ranks
        ]
        self._add_to_logits = head_low_rank.add if head_low_rank else None

    def hidden_states(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Last hidden states (R, H) of tokens (R,) laid out by `layout`."""
        hidden = self._decoder.embed(tokens)  # (R, H)
        cos, sin = self._decoder.rotary(hidden, layout.positions.unsqueeze(0))  # (1, R, D) each
        turn = (array_of(cos[0]), array_of(sin[0]))
        is_prompt = not isinstance(layout, NextTokens)
        for index, adds in enumerate(self._adds_to_prompt if is_prompt else self._adds):
            hidden = self._after(index, hidden, adds, turn, layout)
        return self._decoder.norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores (R, vocabulary) of the next token, float32, from hidden states (R, H)."""
        return self._decoder.head(hidden, self._add_to_logits).float()

    def _after(
        self,
        index: int,
        hidden: torch.Tensor,
        adds: Sequence[_Add | None],
        turn: tuple[Array, Array],
        layout: Layout,
    ) -> torch.Tensor:
        """Hidden states (R, H) after one layer; `turn` is what `kernels.turn` takes."""
        packed = self._decoder.layers[index]
        layer = packed.layer
        heads = packed.qkv(layer.attention_norm(hidden), adds[0])
        heads = heads.view(len(hidden), -1, layer.width)
        if layer.head_norms is not None:
            layer.head_norms(heads)
        kernels.turn(array_of(heads), *turn, layer.turned)
        seen = layout.attend_rows(index, heads, layer.key_heads, layer.scale)
        hidden = packed.output(seen.flatten(1), adds[1], hidden)
        gate_up = packed.gate_up(layer.mlp_norm(hidden), adds[2])  # (R, 2 * I)
        product = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        kernels.silu_product(array_of(gate_up), array_of(product))
        return packed.down(product, adds[3], hidden)


def _packed(layer: Layer) -> _Layer:
    joined = (layer.qkv, layer.output, layer.gate_up, layer.down)
    return _Layer(layer, *(_Packed(some) for some in joined))


def _reordered(weight: torch.Tensor) -> torch.Tensor:
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
