"""Attention for what tinker-local's batches look like, registered with transformers.

transformers' models call the attention function that their config names. Ours leaves the work to
the `Layout` that came with the forward pass, since only that knows which token may see which:
sequences packed without padding (`PackedSequences`), or rows that each grow by one token
(`sampler`).

torch's own flash attention takes 20 % of a training step on a CPU. For sequences of up to 128
tokens, plain matrix products that keep the probabilities take a third to a half of its time. For
longer ones the forward pass is torch's, and the backward pass here, matrix products over blocks of
128 queries, takes about two thirds of torch's for 256 to 512 tokens, and as long from 1,024 on
(bfloat16, 9 heads of 64). Compiled loops (numba, float32, without padding, on all threads) trained
0.9 to 1.1 times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tinker_local.errors import NotServedError

NAME = "tinker_local"
"""What a model's config names as its attention implementation to be sent here."""

_QUERIES_AT_ONCE = 128  # of 16 to 256, the fastest block of the backward pass

_SHORT = 128  # queries
_SCORES_KEPT = 2**18  # a head: 0.5 MB in bfloat16


class Layout(Protocol):
    """Which token may see which, for one forward pass over a row of T tokens."""

    @property
    def positions(self) -> torch.Tensor:
        """Place of each token in its own sequence, (T,), int64."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend within one layer.

        Args:
            layer: Its index, 0 for the first.
            q: Queries, (1, heads, T, D), rotated.
            k: Keys of the same tokens, (1, key-value heads, T, D), rotated.
            v: Values, like k.
            scale: What the scores are multiplied by.

        Returns:
            (1, heads, T, D).
        """


class PackedSequences:
    """One row of T tokens: a prefix that all sequences share, then the sequences, end to end.

    Each sequence sees the prefix and itself, causally; none sees another.
    """

    def __init__(self, prefix: int, lengths: Sequence[int], device: torch.device) -> None:
        """Lay out `prefix` tokens (0: nothing is shared) and sequences of `lengths` tokens."""
        self.prefix = prefix
        self.lengths = tuple(lengths)
        longest = max(lengths)
        sizes = torch.tensor(lengths)
        steps = torch.arange(longest)
        is_real = steps < sizes.unsqueeze(1)  # (B, S)
        starts = (sizes.cumsum(0) - sizes).unsqueeze(1)
        self._padded = torch.where(is_real, starts + steps, 0).flatten().to(device)  # (B * S,)
        self._places: torch.Tensor | None = None  # of the real tokens among the padded
        if min(lengths) < longest:
            self._places = is_real.flatten().nonzero().squeeze(1).to(device)
        later = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        allowed = torch.cat([torch.ones(longest, prefix, dtype=torch.bool), ~later], dim=1)
        self._allowed = allowed.to(device)  # (S, prefix + S)
        own = [prefix + torch.arange(length) for length in lengths]
        self._positions = torch.cat([torch.arange(prefix), *own]).to(device)  # (T,)

    @property
    def positions(self) -> torch.Tensor:
        return self._positions

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        del layer
        own = [self._pad(tensor) for tensor in (q, k, v)]  # (B, heads, S, D)
        if self.prefix == 0:
            return self._pack(_causal(own[0], own[1], own[2], None, scale))
        first = [tensor[:, :, : self.prefix] for tensor in (q, k, v)]
        keys, values = (
            torch.cat([shared.expand(len(self.lengths), -1, -1, -1), tensor], dim=2)
            for shared, tensor in ((first[1], own[1]), (first[2], own[2]))
        )  # (B, key-value heads, prefix + S, D)
        return torch.cat(
            [
                _causal(first[0], first[1], first[2], None, scale),
                self._pack(_causal(own[0], keys, values, self._allowed, scale)),
            ],
            dim=2,
        )

    def _pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(1, heads, T, D) to (B, heads, S, D); what padding holds is never read."""
        own = packed[0, :, self.prefix :].transpose(0, 1)  # (T - prefix, heads, D)
        if self._places is not None:
            own = _gathered(own, self._padded, self._places)
        count = len(self.lengths)
        return own.view(count, -1, *own.shape[1:]).transpose(1, 2)

    def _pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, heads, S, D) to (1, heads, T - prefix, D)."""
        own = padded.transpose(1, 2).flatten(0, 1)  # (B * S, heads, D)
        if self._places is not None:
            own = _gathered(own, self._places, None)
        return own.transpose(0, 1).unsqueeze(0)


def _gathered(rows: torch.Tensor, index: torch.Tensor, back: torch.Tensor | None) -> torch.Tensor:
    """rows[index], (M, ...); `back`, where known, is the index that undoes it."""
    gather: Any = _Gather.apply
    return cast("torch.Tensor", gather(rows, index, back))


class _Gather(torch.autograd.Function):
    """Between packed and padded rows. torch's own gradient of an index costs 3 % of a step."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, index: torch.Tensor, back: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(index, back)
        ctx.count = len(rows)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        index, back = ctx.saved_tensors
        if back is not None:  # padding has no gradient: only its own tokens, masked out, saw it
            return gradient[back], None, None
        rows = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return rows.index_copy_(0, index, gradient), None, None


def _causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention of the last S of L tokens to those up to their own place.

    Args:
        q: (B, heads, S, D).
        k: (B, key-value heads, L, D).
        v: Like k.
        allowed: (S, L), true where a query may see a key; None where S is L.
        scale: What the scores are multiplied by.

    Returns:
        (B, heads, S, D).
    """
    if q.device.type == "cpu":  # without gradients too: the same numbers either way
        is_short = q.shape[2] <= _SHORT and len(q) * q.shape[2] * k.shape[2] <= _SCORES_KEPT
        attend: Any = (_ShortCpuAttention if is_short else _LongCpuAttention).apply
        return cast("torch.Tensor", attend(q, k, v, allowed, scale))
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=True
    )


def _bias(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores: 0 where a query may see a key, else minus infinity."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)


class _ShortCpuAttention(torch.autograd.Function):
    """`_causal` for few queries: the probabilities are kept, (B, heads, S, L).

    With P = softmax(scale * q k^T), in float32, O = P v and a gradient G of O, row by row:
    dv = P^T G, dS = P * (G v^T - sum(G * O)), dq = scale * dS k, dk = scale * dS^T q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        allowed: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        (batch, _, queries, width), (key_heads, keys) = q.shape, k.shape[1:3]
        if allowed is None:
            allowed = torch.ones(queries, keys, dtype=torch.bool).tril()
        rows = q.reshape(batch, key_heads, -1, width)  # (B, K, G * S, D)
        scores = rows.float() @ (k.float() * scale).transpose(-1, -2)
        scores = scores.view(batch, -1, queries, keys).add_(_bias(allowed, torch.float32))
        p = scores.softmax(-1).to(q.dtype).view(batch, key_heads, -1, keys)
        output = p @ v
        ctx.save_for_backward(rows, k, v, output, p)
        ctx.scale = scale
        return output.view(q.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, k, v, output, p = ctx.saved_tensors
        some = gradient.reshape(rows.shape)
        delta = (some.float() * output).sum(-1, keepdim=True)  # (B, K, G * S, 1)
        dp = (some @ v.transpose(-1, -2)).float()
        ds = dp.sub_(delta).mul_(p).mul_(ctx.scale).to(p.dtype)
        dq, dk = ds @ k, ds.transpose(-1, -2) @ rows
        return dq.view(gradient.shape), dk, p.transpose(-1, -2) @ some, None, None


class _LongCpuAttention(torch.autograd.Function):
    """`_causal` for many queries: the probabilities are computed again, in float32.

    P = exp(scale * q k^T - logsumexp); the rest as in `_ShortCpuAttention` (Dao 2023,
    FlashAttention-2, algorithm 2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        allowed: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        bias = None if allowed is None else _bias(allowed, q.dtype)
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q,
            k.repeat_interleave(groups, 1),
            v.repeat_interleave(groups, 1),
            is_causal=allowed is None,
            attn_mask=None if bias is None else bias[None, None],
            scale=scale,
        )
        ctx.save_for_backward(q, k, v, output, logsumexp)
        ctx.scale = scale
        return cast("torch.Tensor", output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        q, k, v, output, logsumexp = ctx.saved_tensors
        batch, heads, queries, width = q.shape
        key_heads, keys = k.shape[1], k.shape[2]
        before = keys - queries  # keys that every query sees
        grouped = (batch, key_heads, heads // key_heads, queries)
        q, gradient = q.reshape(*grouped, width), gradient.reshape(*grouped, width)
        delta = (gradient.float() * output.reshape(*grouped, width)).sum(-1)  # (B, K, G, S)
        logsumexp = logsumexp.reshape(grouped)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros(k.shape, dtype=torch.float32)
        dv = torch.zeros(k.shape, dtype=torch.float32)
        scaled_k = k.float() * ctx.scale
        for start in range(0, queries, _QUERIES_AT_ONCE):
            end = min(start + _QUERIES_AT_ONCE, queries)
            size, seen = end - start, before + end
            rows, block = (batch, key_heads, -1, width), (*grouped[:3], size, seen)
            some_q = q[..., start:end, :].reshape(rows)  # (B, K, G * size, D)
            some_gradient = gradient[..., start:end, :].reshape(rows)
            scores = some_q.float() @ scaled_k[:, :, :seen].transpose(-1, -2)
            scores = scores.view(block)  # (B, K, G, size, seen)
            later = torch.ones(size, size, dtype=torch.bool).triu(1)
            scores[..., seen - size :].masked_fill_(later, -torch.inf)
            p = scores.sub_(logsumexp[..., start:end].unsqueeze(-1)).exp_()
            low_p = p.to(v.dtype).flatten(2, 3)  # (B, K, G * size, seen)
            dv[:, :, :seen] += low_p.transpose(-1, -2) @ some_gradient
            dp = (some_gradient @ v[:, :, :seen].transpose(-1, -2)).float().view(block)
            ds = p.mul_(dp.sub_(delta[..., start:end].unsqueeze(-1))).to(v.dtype).flatten(2, 3)
            dq[..., start:end, :] = (ds @ k[:, :, :seen]).view(*grouped[:3], size, width)
            dk[:, :, :seen] += ds.transpose(-1, -2) @ some_q
        dq = dq.mul_(ctx.scale).view(batch, heads, queries, width)
        return dq, dk.mul_(ctx.scale).to(k.dtype), dv.to(v.dtype), None, None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer; see its AttentionInterface."""
    del attention_mask
    if softcap is not None or s_aux is not None:
        raise NotServedError(
            f"{type(module).__name__} caps its scores or has attention sinks.",
            "tinker-local serves models with plain softmax attention: Llama, Qwen, SmolLM ...",
        )
    if sliding_window is not None and int(layout.positions.max()) >= sliding_window:
        raise NotServedError(
            f"{type(module).__name__} looks back over {sliding_window} tokens only.",
            f"Keep sequences within {sliding_window} tokens.",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(module.layer_idx, query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
# Layouts know their masks; any that transformers would make is not used.
AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)
