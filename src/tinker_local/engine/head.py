"""Log-probabilities of target tokens, with a backward pass that spares time and memory.

Logits are the largest tensors of a step: 0.2 MB a token in float32 at a vocabulary of 49,152, and
autograd keeps several of that size. Here they are kept once, in the model's own format, a few rows
at a time are in float32, and the backward pass leaves out the rows from which no gradient comes
(prompts: their weight or advantage is 0).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tinker_local.engine import kernels
from tinker_local.engine.autograd import applied
from tinker_local.engine.kernels import array_of
from tinker_local.engine.lora import LoraLinear, adapted_linear, low_rank_gradients

_ROWS_IN_FLOAT32 = 32  # 6 MB at a vocabulary of 49,152: they stay in the cache
_ROWS_KEPT = 1024  # 100 MB in bfloat16; of more rows the logits are computed twice instead


def target_logprobs(
    hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, head: LoraLinear
) -> torch.Tensor:
    """Log-probability of each target after the hidden state it is asked of.

    A hidden state may be asked for any number of targets, or none.

    Args:
        hidden: Last hidden states, (M, H).
        rows: Which hidden state each target is asked of, (P,), int64.
        targets: Token ids, (P,), int64.
        head: The layer that makes logits of hidden states.

    Returns:
        (P,), float32, in nats; differentiable in `hidden` and the head's adapter.
    """
    order = rows.argsort(stable=True)
    rows, targets = rows[order], targets[order]
    pieces = []
    for start in range(0, len(hidden), _ROWS_KEPT):
        first, last = torch.searchsorted(rows, torch.tensor([start, start + _ROWS_KEPT])).tolist()
        piece = (
            hidden[start : start + _ROWS_KEPT],
            rows[first:last] - start,
            targets[first:last],
            head,
        )
        if len(hidden) > _ROWS_KEPT and torch.is_grad_enabled():
            pieces.append(checkpoint(_score, *piece, use_reentrant=False))
        else:
            pieces.append(_score(*piece))
    scores = torch.cat(pieces)
    return torch.empty_like(scores).index_copy(0, order, scores)


def _score(
    hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, head: LoraLinear
) -> torch.Tensor:
    """`target_logprobs` for ascending `rows`."""
    a, b = (None, None) if head.active is None else (head.active.a, head.active.b)
    return applied(_Score, hidden, head.weight, head.base.bias, a, b, head.scale, rows, targets)


class _Score(torch.autograd.Function):
    """The softmax's gradient: onehot(target) - softmax(logits), weighted, per row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scale: float,
        rows: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        low = low_a = low_b = None
        if a is None or b is None:
            logits = functional.linear(hidden, weight, bias)
        else:
            low_a, low_b = a.to(hidden.dtype), b.to(hidden.dtype)
            logits, low = adapted_linear(hidden, weight, bias, low_a, low_b, scale)
        logsumexp = _log_sum_exp(logits)  # (M,)
        ctx.save_for_backward(hidden, weight, low_a, low_b, low, logits, logsumexp, rows, targets)
        ctx.scale = scale
        return logits[rows, targets].float() - logsumexp[rows]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        hidden, weight, a, b, low, logits, logsumexp, rows, targets = ctx.saved_tensors
        counts = rows.new_zeros(len(hidden)).index_add_(0, rows, (gradient != 0).long())
        wanted = counts.nonzero().squeeze(1)  # (W,): rows with a gradient
        place = rows.new_full((len(hidden),), -1).index_copy_(
            0, wanted, torch.arange(len(wanted), device=rows.device)
        )
        is_used = place[rows] >= 0
        rows, targets, gradient = place[rows][is_used], targets[is_used], gradient[is_used]
        dlogits = _to_gradient_(logits, logsumexp, wanted, rows, targets, gradient)

        some_hidden = dlogits @ weight  # (W, H)
        da = db = None
        if a is not None:
            low_gradient, da, db = low_rank_gradients(
                dlogits, hidden[wanted], low[wanted], b, ctx.scale
            )
            some_hidden.addmm_(low_gradient, a)
        dhidden = torch.zeros_like(hidden).index_copy_(0, wanted, some_hidden)
        return dhidden, None, None, da, db, None, None, None


def _has_loops(logits: torch.Tensor) -> bool:
    """Whether `kernels` can be given these: they take 0.4 of the time of torch's operators."""
    return logits.device.type == "cpu"


def _log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Of each row of (M, vocabulary), float32."""
    if not _has_loops(logits):
        some = torch.split(logits, _ROWS_IN_FLOAT32)
        return torch.cat([rows.float().logsumexp(-1) for rows in some])
    output = torch.empty(len(logits))
    kernels.log_sum_exp(array_of(logits), array_of(output))
    return output


def _to_gradient_(
    logits: torch.Tensor,
    logsumexp: torch.Tensor,
    wanted: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """The gradient of some rows of logits, (W, vocabulary); the logits may be overwritten.

    Args:
        logits: (M, vocabulary).
        logsumexp: Of each row, (M,), float32.
        wanted: Which rows, ascending, (W,).
        rows: Which of the wanted rows each score comes from, (P,), ascending.
        targets: The token each score is of, (P,).
        gradient: Of each score, (P,), float32.
    """
    if not _has_loops(logits):
        return _gradient_of(logits[wanted], logsumexp[wanted], rows, targets, gradient)
    starts = torch.searchsorted(rows, torch.arange(len(wanted) + 1))
    some = (logits, logsumexp, wanted, starts, targets, gradient)
    kernels.log_softmax_gradient(*(array_of(tensor) for tensor in some))
    return logits[: len(wanted)]


def _gradient_of(
    logits: torch.Tensor,
    logsumexp: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """`_to_gradient_` of all rows with torch's operators, in place."""
    row_gradient = gradient.new_zeros(len(logits)).index_add_(0, rows, gradient)  # (W,)
    starts = torch.arange(0, len(logits) + _ROWS_IN_FLOAT32, _ROWS_IN_FLOAT32)
    bounds = torch.searchsorted(rows, starts.to(rows.device)).tolist()
    for start, (first, last) in zip(starts.tolist(), pairwise(bounds), strict=False):
        some = slice(start, start + _ROWS_IN_FLOAT32)
        p = logits[some].float().sub_(logsumexp[some].unsqueeze(1)).exp_()
        p.mul_(-row_gradient[some].unsqueeze(1))
        places = (rows[first:last] - start, targets[first:last])
        logits[some] = p.index_put_(places, gradient[first:last], accumulate=True)
    return logits
