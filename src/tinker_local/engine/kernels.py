"""What lies between a model's matrix products, compiled for this CPU by numba.

A step that draws tokens has a row or a few dozen, so that an operator of torch costs more to call
than to compute, and a layer has fifty of them besides its four large products. Here they are ten
loops a layer: of a step with an adapter, 1 row takes 1.45 times, 8 rows 1.3 times and 32 rows 1.1
times as long with operators (bfloat16, SmolLM2-135M, 2 cores). In training, one loop goes over the
numbers where operators go over them four to eight times, so that it takes half of their time on a
single thread (`log_sum_exp` 0.4, `softmax_gradient` 0.5 of it) or as long (`causal_softmax`).

Arrays are those of tensors (`array_of`): float32, or bfloat16 as its bits in uint16. All sums are
in float32 and rounded where the training forward pass rounds, so that the two differ by the order
of additions alone. Each loop runs in the calling thread, without Python's lock. Compiled code is
kept on disk, beside this file or in the user's cache: the first start, step and sequence ever take
3, 2 and 8 s longer. numba looks at this file alone to see whether that is still right, so loops
that call each other stay together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload

_FASTMATH = {"reassoc", "contract", "nsz"}
"""Sums may be taken in any order; nothing assumes that numbers are finite."""

_ROWS_AT_ONCE = 32  # of prompts: what they make stays in the cache

_LOG2_E = np.float32(1 / math.log(2))
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is ln 2


def array_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's own memory: float32, or uint16 of a bfloat16 tensor."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _compiled(function: Callable[..., Any]) -> Any:
    def compiled(*, cache: bool) -> Any:
        return numba.njit(cache=cache, nogil=True, fastmath=_FASTMATH, error_model="numpy")

    try:
        return compiled(cache=True)(function)
    except RuntimeError:  # no folder to keep it in is writable
        return compiled(cache=False)(function)


def _wide(stored: Any) -> Any:
    """A stored number as float32."""


def _stored(number: Any, like: Any) -> Any:
    """A float32 as an array like this one stores it; bfloat16 is rounded to nearest even."""


@overload(_wide, inline="always")
def _wide_of_type(stored: Any) -> Any:
    def same(stored: Any) -> Any:
        return stored

    def widened(stored: Any) -> Any:
        return np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)

    return widened if isinstance(stored, numba.types.Integer) else same


@overload(_stored, inline="always")
def _stored_as_type(number: Any, like: Any) -> Any:
    def same(number: Any, like: Any) -> Any:
        return number

    def rounded(number: Any, like: Any) -> Any:
        bits = np.float32(number).view(np.uint32)
        is_odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + is_odd)) >> np.uint32(16))

    return rounded if isinstance(like.dtype, numba.types.Integer) else same


@_compiled
def _exp(x: Any) -> Any:
    """e^x of a float32, to 2e-7 of it; numba's own is called for each number by itself.

    x = n ln 2 + r, and a polynomial in r (Moshier 1989, Cephes, expf.c). Beyond 88 infinite, below
    -87 as there, 2e-38.
    """
    is_large = x > np.float32(88.0)
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    power = np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)
    return np.float32(np.inf) if is_large else y * power


@_compiled
def _normalize(x: Any, weight: Any, eps: Any, out: Any) -> None:
    squares = np.float32(0)
    for i in range(len(x)):
        squares += _wide(x[i]) * _wide(x[i])
    scale = np.float32(1) / np.float32(math.sqrt(squares / np.float32(len(x)) + eps))
    for i in range(len(x)):
        out[i] = _stored(_wide(_stored(_wide(x[i]) * scale, out)) * weight[i], out)


@_compiled
def rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang 2019).

    Args:
        x: (R, H).
        weight: (H,), float32.
        eps: float32.
        out: Like x.
    """
    for row in range(len(x)):
        _normalize(x[row], weight, eps, out[row])


@_compiled
def rms_norm_heads(heads: Any, first: Any, end: Any, weight: Any, eps: Any) -> None:
    """`rms_norm`, in place, of heads `first` to `end` of (R, heads, D), each by itself."""
    for row in range(len(heads)):
        for head in range(first, end):
            _normalize(heads[row, head], weight, eps, heads[row, head])


@_compiled
def rms_norm_gradient(x: Any, weight: Any, eps: Any, gradient: Any, out: Any) -> None:
    """Add the gradient of x, from that of `rms_norm`'s output, to `out`.

    With r = 1 / sqrt(mean(x^2) + eps) and g the gradient times the weight, it is
    r * (g - x * r^2 * mean(g * x)).

    Args:
        x: (R, H).
        weight: (H,), float32.
        eps: float32.
        gradient: Like x.
        out: Like x, added to.
    """
    for row in range(len(x)):
        _normalize_back(x[row], weight, eps, gradient[row], out[row])


@_compiled
def _normalize_back(x: Any, weight: Any, eps: Any, gradient: Any, out: Any) -> None:
    squares = products = np.float32(0)
    for i in range(len(x)):
        number = _wide(x[i])
        squares += number * number
        products += _wide(gradient[i]) * weight[i] * number
    scale = np.float32(1) / np.float32(math.sqrt(squares / np.float32(len(x)) + eps))
    share = products / np.float32(len(x)) * scale * scale
    for i in range(len(x)):
        own = scale * (_wide(gradient[i]) * weight[i] - _wide(x[i]) * share)
        out[i] = _stored(_wide(out[i]) + own, out)


@_compiled
def rms_norm_heads_gradient(
    heads: Any, gradient: Any, first: Any, end: Any, weight: Any, eps: Any
) -> None:
    """Replace the gradient of what `rms_norm_heads` made by that of `heads`, (R, heads, D)."""
    given = np.empty(heads.shape[2], heads.dtype)
    for row in range(len(heads)):
        for head in range(first, end):
            given[:] = gradient[row, head]
            gradient[row, head, :] = 0
            _normalize_back(heads[row, head], weight, eps, given, gradient[row, head])


@_compiled
def turn(heads: Any, cos: Any, sin: Any, count: Any) -> None:
    """Rotary position embedding, in place (Su 2021, RoFormer, in transformers' form).

    Rounded after each step, as in training: in one step, sampler and training forward were half
    as far again from each other.

    Args:
        heads: (R, heads, D), of which the first `count` are turned.
        cos: (R, D), stored as heads are.
        sin: Like cos.
        count: Queries and keys.
    """
    rows, _, width = heads.shape
    half = width // 2
    for row in range(rows):
        for head in range(count):
            x = heads[row, head]
            for i in range(half):
                low, high = _wide(x[i]), _wide(x[half + i])
                low_cos = _wide(_stored(low * _wide(cos[row, i]), x))
                low_sin = _wide(_stored(high * _wide(sin[row, i]), x))
                high_cos = _wide(_stored(high * _wide(cos[row, half + i]), x))
                high_sin = _wide(_stored(low * _wide(sin[row, half + i]), x))
                x[i] = _stored(low_cos - low_sin, x)
                x[half + i] = _stored(high_cos + high_sin, x)


@_compiled
def silu_product(gate_up: Any, out: Any) -> None:
    """silu(gate) * up, where silu(x) = x / (1 + e^-x).

    Args:
        gate_up: (R, 2 * I), the gates first.
        out: (R, I).
    """
    rows, size = out.shape
    for row in range(rows):
        gates, ups, products = gate_up[row, :size], gate_up[row, size:], out[row]
        for i in range(size):
            gate = _wide(gates[i])
            opened = _wide(_stored(gate / (np.float32(1) + _exp(-gate)), out))
            products[i] = _stored(opened * _wide(ups[i]), out)


@_compiled
def silu_product_gradient(gate_up: Any, gradient: Any, out: Any) -> None:
    """The gradient of `silu_product`'s input, from that of its output.

    With s = 1 / (1 + e^-gate) it is gradient * up * s * (1 + gate * (1 - s)), and
    gradient * gate * s.

    Args:
        gate_up: (R, 2 * I), the gates first.
        gradient: (R, I).
        out: Like gate_up.
    """
    rows, size = gradient.shape
    for row in range(rows):
        gates, ups, given = gate_up[row, :size], gate_up[row, size:], gradient[row]
        gate_out, up_out = out[row, :size], out[row, size:]
        for i in range(size):
            gate, up, g = _wide(gates[i]), _wide(ups[i]), _wide(given[i])
            s = np.float32(1) / (np.float32(1) + _exp(-gate))
            gate_out[i] = _stored(g * up * s * (np.float32(1) + gate * (np.float32(1) - s)), out)
            up_out[i] = _stored(g * gate * s, out)


@_compiled
def _greatest(x: Any) -> Any:
    """The greatest of a row, found among integers that are in the order of the numbers.

    A maximum of floats is not vectorized while NaN may occur; here that is greater than all.
    """
    most = np.int32(-(2**31))
    for i in range(len(x)):
        most = np.int32(max(most, _in_order(np.float32(_wide(x[i])).view(np.int32))))
    return np.int32(_in_order(most)).view(np.float32)


@_compiled
def _in_order(bits: Any) -> Any:
    """Of a float32, an integer in the order of the numbers; of that, the bits again."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_compiled
def log_sum_exp(rows: Any, out: Any) -> None:
    """ln(sum(e^x)) of each row of (R, N), into (R,), float32."""
    for row in range(len(rows)):
        x = rows[row]
        most = _greatest(x)
        total = np.float32(0)
        for i in range(len(x)):
            total += _exp(_wide(x[i]) - most)
        out[row] = most + np.float32(math.log(total))


@_compiled
def log_softmax_gradient(
    logits: Any, log_totals: Any, wanted: Any, starts: Any, targets: Any, gradient: Any
) -> None:
    """Replace logits by their gradient, from that of the targets' log-probabilities.

    Of a row with targets t and gradients g of theirs: the sum of g at t, less sum(g) * softmax.

    Args:
        logits: (R, N). Its first W rows are overwritten with the gradients of those wanted.
        log_totals: ln(sum(e^x)) of each row, (R,), float32.
        wanted: Rows that have a gradient, ascending, (W,), int64.
        starts: Where the targets of each of them begin, and the end of the last, (W + 1,), int64.
        targets: (P,), int64.
        gradient: (P,), float32.
    """
    wide = np.empty(logits.shape[1], np.float32)
    for place in range(len(wanted)):
        x, log_total, out = logits[wanted[place]], log_totals[wanted[place]], logits[place]
        total = np.float32(0)
        for index in range(starts[place], starts[place + 1]):
            total += gradient[index]
        for i in range(len(x)):
            wide[i] = -total * _exp(_wide(x[i]) - log_total)
        for index in range(starts[place], starts[place + 1]):
            wide[targets[index]] += gradient[index]
        for i in range(len(x)):
            out[i] = _stored(wide[i], out)


@_compiled
def causal_softmax(scores: Any, out: Any) -> None:
    """Softmax over the keys that a query may see: the last ones are the queries' own.

    Args:
        scores: (heads, S, L), float32.
        out: Like scores; 0 where a query may not see a key.
    """
    heads, queries, keys = scores.shape
    p = np.empty(keys, np.float32)
    for head in range(heads):
        for query in range(queries):
            x, row = scores[head, query, : keys - queries + query + 1], out[head, query]
            most, total = _greatest(x), np.float32(0)
            for i in range(len(x)):
                p[i] = _exp(x[i] - most)
                total += p[i]
            share = np.float32(1) / total
            for i in range(len(x)):
                row[i] = _stored(p[i] * share, out)
            row[len(x) :] = 0


@_compiled
def softmax_gradient(p: Any, gradient: Any, scale: Any) -> None:
    """Replace the gradient of p = softmax(scale * s) by that of s: scale * p * (g - sum(p * g)).

    Args:
        p: (heads, S, L).
        gradient: Like p.
        scale: float32.
    """
    heads, queries, keys = p.shape
    for head in range(heads):
        for query in range(queries):
            x, g = p[head, query], gradient[head, query]
            product = np.float32(0)
            for i in range(keys):
                product += _wide(x[i]) * _wide(g[i])
            for i in range(keys):
                g[i] = _stored(scale * _wide(x[i]) * (_wide(g[i]) - product), gradient)


@_compiled
def attend(
    heads: Any, kept: Any, first: Any, places: Any, prompt: Any, scale: Any, out: Any
) -> None:
    """Keep a new token's key and value in each row, and attend to all that it may see.

    Args:
        heads: Queries, keys and values of the new tokens, (R, heads + 2 * K, D).
        kept: Keys and values of more rows than these, (2, rows, K, T, D), float32.
        first: The row of `kept` that is the first of these.
        places: The new token's place in its row, (R,), int64.
        prompt: Keys and values that precede these rows, (2, K, P, D), float32; P may be 0.
        scale: What scores are multiplied by, float32.
        out: (R, heads, D).
    """
    rows, queries, width = out.shape
    key_heads = kept.shape[2]
    groups = queries // key_heads
    padded = _in_fours(rows * groups)
    query = np.zeros((padded, width), np.float32)
    seen = np.zeros((padded, width), np.float32)
    prompt_p = np.empty((padded, prompt.shape[2]), np.float32)
    p = np.empty(places.max() + 1, np.float32)
    for key_head in range(key_heads):
        for row in range(rows):
            for group in range(groups):
                for i in range(width):
                    number = _wide(heads[row, key_head * groups + group, i])
                    query[row * groups + group, i] = number * scale
        _products(query, prompt[0, key_head], prompt_p)
        for row in range(rows):
            own = p[: places[row] + 1]
            keys, values = kept[0, first + row, key_head], kept[1, first + row, key_head]
            for i in range(width):
                keys[places[row], i] = _wide(heads[row, queries + key_head, i])
                values[places[row], i] = _wide(heads[row, queries + key_heads + key_head, i])
            for index in range(row * groups, (row + 1) * groups):
                _scores(query[index], keys, own)
                _softmax(own, prompt_p[index])
                _weighted_sum(own, values, seen[index])
        _add_products(prompt_p, 0, prompt[1, key_head], 0, width, seen)
        for row in range(rows):
            for group in range(groups):
                for i in range(width):
                    number = seen[row * groups + group, i]
                    out[row, key_head * groups + group, i] = _stored(number, out)


@_compiled
def _scores(query: Any, keys: Any, scores: Any) -> None:
    for place in range(len(scores)):
        score = np.float32(0)
        for i in range(len(query)):
            score += query[i] * keys[place, i]
        scores[place] = score


@_compiled
def _softmax(scores: Any, others: Any) -> None:
    """In place, over both together."""
    most = np.float32(-np.inf)
    for i in range(len(scores)):
        most = max(most, scores[i])
    for i in range(len(others)):
        most = max(most, others[i])
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = _exp(scores[i] - most)
        total += scores[i]
    for i in range(len(others)):
        others[i] = _exp(others[i] - most)
        total += others[i]
    share = np.float32(1) / total
    for i in range(len(scores)):
        scores[i] *= share
    for i in range(len(others)):
        others[i] *= share


@_compiled
def _weighted_sum(p: Any, values: Any, out: Any) -> None:
    """Sum of p[t] * values[t], (D,); four at a time, so that `out` is read a quarter as often."""
    out[:] = np.float32(0)
    whole = len(p) - len(p) % 4
    for t in range(0, whole, 4):
        p0, p1, p2, p3 = p[t], p[t + 1], p[t + 2], p[t + 3]
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        for i in range(len(out)):
            out[i] += p0 * v0[i] + p1 * v1[i] + p2 * v2[i] + p3 * v3[i]
    for t in range(whole, len(p)):
        for i in range(len(out)):
            out[i] += p[t] * values[t, i]


@_compiled
def add_low_rank(x: Any, a: Any, b: Any, sizes: Any, out: Any) -> None:
    """Add B A x of several layers, which read the same x, to their outputs.

    Args:
        x: (R, in).
        a: A of each layer, one under the other, (layers * rank, in).
        b: B of each layer, transposed, side by side, (rank, outputs together).
        sizes: Outputs of each layer, int64.
        out: (R, outputs together), added to; stored like x, a and b.
    """
    for first in range(0, len(x), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        _add_low_rank(x[some], a, b, sizes, out[some])


@_compiled
def _add_low_rank(x: Any, a: Any, b: Any, sizes: Any, out: Any) -> None:
    rows, rank = _in_fours(len(x)), len(b)
    wide = np.zeros((rows, x.shape[1]), np.float32)
    for row in range(len(x)):
        for i in range(x.shape[1]):
            wide[row, i] = _wide(x[row, i])
    low = np.empty((rows, len(a)), np.float32)
    _products(wide, a, low)
    for row in range(rows):
        for i in range(len(a)):
            low[row, i] = _wide(_stored(low[row, i], a))
    added = np.zeros((rows, out.shape[1]), np.float32)
    start = 0
    for layer in range(len(sizes)):
        _add_products(low, layer * rank, b, start, start + sizes[layer], added)
        start += sizes[layer]
    for row in range(len(x)):
        for i in range(out.shape[1]):
            out[row, i] = _stored(_wide(out[row, i]) + added[row, i], out)


@_compiled
def _in_fours(rows: Any) -> Any:
    """So many rows that all are computed in blocks of four: else a row's sums would be taken in
    another order, and come out otherwise, for other numbers of rows beside it."""
    return (rows + 3) // 4 * 4


@_compiled
def _products(x: Any, a: Any, out: Any) -> None:
    """x a^T, (R, n), R a multiple of 4.

    Four rows and two columns at a time, so that a number is read for several of them.
    """
    rows, columns = out.shape
    for r in range(0, rows, 4):
        x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
        for j in range(0, columns - 1, 2):
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = np.float32(0)
            first, second = a[j], a[j + 1]
            for i in range(x.shape[1]):
                u, v = _wide(first[i]), _wide(second[i])
                s0, s1, s2, s3 = s0 + x0[i] * u, s1 + x1[i] * u, s2 + x2[i] * u, s3 + x3[i] * u
                t0, t1, t2, t3 = t0 + x0[i] * v, t1 + x1[i] * v, t2 + x2[i] * v, t3 + x3[i] * v
            out[r, j], out[r + 1, j], out[r + 2, j], out[r + 3, j] = s0, s1, s2, s3
            out[r, j + 1], out[r + 1, j + 1], out[r + 2, j + 1], out[r + 3, j + 1] = t0, t1, t2, t3
        if columns % 2:
            _dot_rows(x[r : r + 4], a, columns - 1, out[r : r + 4])


@_compiled
def _dot_rows(x: Any, a: Any, column: Any, out: Any) -> None:
    for row in range(len(x)):
        total = np.float32(0)
        for i in range(x.shape[1]):
            total += x[row, i] * _wide(a[column, i])
        out[row, column] = total


@_compiled
def _add_products(x: Any, column: Any, b: Any, start: Any, end: Any, out: Any) -> None:
    """Add x b, (R, n), of some columns: four rows and four columns of x at a time, as `_products`.

    Args:
        x: (R, columns), R a multiple of 4, of which as many count, from `column` on, as b has rows.
        b: (rows, outputs).
        start, end: The outputs that count.
        out: (R, outputs), added to.
    """
    whole = len(b) - len(b) % 4
    for j in range(0, whole, 4):
        b0, b1 = b[j, start:end], b[j + 1, start:end]
        b2, b3 = b[j + 2, start:end], b[j + 3, start:end]
        for r in range(0, len(x), 4):
            x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
            o0, o1 = out[r, start:end], out[r + 1, start:end]
            o2, o3 = out[r + 2, start:end], out[r + 3, start:end]
            c = column + j
            p0, p1, p2, p3 = x0[c], x0[c + 1], x0[c + 2], x0[c + 3]
            q0, q1, q2, q3 = x1[c], x1[c + 1], x1[c + 2], x1[c + 3]
            s0, s1, s2, s3 = x2[c], x2[c + 1], x2[c + 2], x2[c + 3]
            t0, t1, t2, t3 = x3[c], x3[c + 1], x3[c + 2], x3[c + 3]
            for i in range(len(o0)):
                v0, v1, v2, v3 = _wide(b0[i]), _wide(b1[i]), _wide(b2[i]), _wide(b3[i])
                o0[i] += p0 * v0 + p1 * v1 + p2 * v2 + p3 * v3
                o1[i] += q0 * v0 + q1 * v1 + q2 * v2 + q3 * v3
                o2[i] += s0 * v0 + s1 * v1 + s2 * v2 + s3 * v3
                o3[i] += t0 * v0 + t1 * v1 + t2 * v2 + t3 * v3
    for j in range(whole, len(b)):
        for r in range(len(x)):
            o, row, factor = out[r, start:end], b[j, start:end], x[r, column + j]
            for i in range(len(o)):
                o[i] += factor * _wide(row[i])
