"""Causal attention and its gradient.

torch's own flash attention takes 20 % of a training step on a CPU. Where scores are few, they are
kept: plain matrix products with compiled loops between them, 0.45 (200 tokens) to 0.6 (512) of the
time of the other way here. In that the forward pass is torch's, and the backward pass matrix
products over blocks of 128 queries: two thirds of torch's time for 256 to 512 tokens, and as long
from 1,024 on (bfloat16, 9 heads of 64). With all of it in compiled loops (numba, float32, without
padding, on all threads) a step took as long.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional

from tinker_local.engine import kernels
from tinker_local.engine.autograd import applied
from tinker_local.engine.kernels import array_of

_QUERIES_AT_ONCE = 128  # of 16 to 256, the fastest block of the backward pass

_SCORES_KEPT = 2**18  # a head: 0.5 MB in bfloat16, one sequence of 512 tokens


def causal(
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
        allowed: That as a mask, (S, L), true where a query may see a key; None where S is L.
        scale: What the scores are multiplied by.

    Returns:
        (B, heads, S, D).
    """
    if q.device.type == "cpu":  # without gradients too: the same numbers either way
        if len(q) * q.shape[2] * k.shape[2] <= _SCORES_KEPT:
            return applied(_ShortCpuAttention, q, k, v, scale)
        return applied(_LongCpuAttention, q, k, v, allowed, scale)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=True
    )


def _bias(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores: 0 where a query may see a key, else minus infinity."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)


class _ShortCpuAttention(torch.autograd.Function):
    """`causal` where scores are few: the probabilities are kept, (B, heads, S, L).

    With P = softmax(scale * q k^T), in float32, O = P v and a gradient G of O, row by row:
    dv = P^T G, dP = G v^T, dS = P * (dP - sum(P * dP)), dq = scale * dS k, dk = scale * dS^T q.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        (batch, _, queries, width), (key_heads, keys) = q.shape, k.shape[1:3]
        rows = q.reshape(batch, key_heads, -1, width)  # (B, K, G * S, D)
        scores = rows.float() @ (k.float() * scale).transpose(-1, -2)
        p = torch.empty_like(scores, dtype=q.dtype)  # (B, K, G * S, L)
        shape = (-1, queries, keys)
        kernels.causal_softmax(array_of(scores.view(shape)), array_of(p.view(shape)))
        ctx.save_for_backward(rows, k, v, p)
        ctx.scale = scale
        return (p @ v).view(q.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, k, v, p = ctx.saved_tensors
        some = gradient.reshape(rows.shape)
        ds = some @ v.transpose(-1, -2)  # (B, K, G * S, L)
        arrays = [array_of(tensor.flatten(0, 1)) for tensor in (p, ds)]
        kernels.softmax_gradient(*arrays, np.float32(ctx.scale))
        dq, dk = ds @ k, ds.transpose(-1, -2) @ rows
        return dq.view(gradient.shape), dk, p.transpose(-1, -2) @ some, None


class _LongCpuAttention(torch.autograd.Function):
    """`causal` for many queries: the probabilities are computed again, in float32.

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
