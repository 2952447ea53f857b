"""The compiled loops against torch's operators, in both number formats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional

from tinker_local.engine import kernels
from tinker_local.engine.kernels import array_of

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 3, 4, 9]  # beside and within the blocks of four

both = pytest.mark.parametrize("dtype", DTYPES, ids=str)
some_rows = pytest.mark.parametrize("rows", ROWS)


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To the last bit but one of the format."""
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=2 * eps, atol=8 * eps)


@both
def test_an_array_is_the_tensors_own_memory(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3, dtype=dtype)

    array_of(tensor)[1, 2] = array_of(torch.ones(1, dtype=dtype))[0]

    assert tensor.tolist() == [[0, 0, 0], [0, 0, 1]]


@both
@some_rows
def test_rms_norm_is_torchs(rows: int, dtype: torch.dtype) -> None:
    x, weight = _random(rows, 24, dtype=dtype), _random(24, dtype=dtype, seed=1)
    output = torch.empty_like(x)

    kernels.rms_norm(array_of(x), weight.float().numpy(), np.float32(1e-5), array_of(output))

    normed = functional.rms_norm(x.float(), (24,), eps=1e-5).to(dtype)
    _assert_close(output, normed * weight)


@both
def test_only_the_heads_that_are_named_are_normalized(dtype: torch.dtype) -> None:
    heads, weight = _random(3, 5, 8, dtype=dtype), _random(8, seed=1)
    expected = heads.clone()
    expected[:, 1:3] = functional.rms_norm(heads[:, 1:3].float(), (8,), eps=1e-5).to(dtype)
    expected[:, 1:3] = (expected[:, 1:3].float() * weight).to(dtype)

    kernels.rms_norm_heads(array_of(heads), 1, 3, weight.numpy(), np.float32(1e-5))

    _assert_close(heads, expected)


@both
def test_the_first_heads_are_turned_as_transformers_does(dtype: torch.dtype) -> None:
    heads = _random(4, 5, 8, dtype=dtype)
    angles = _random(4, 8, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    low, high = heads[:, :3].chunk(2, dim=-1)
    turned = heads[:, :3] * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    expected = torch.cat([turned, heads[:, 3:]], dim=1)

    kernels.turn(array_of(heads), array_of(cos), array_of(sin), 3)

    _assert_close(heads, expected)


@both
def test_silu_product_is_torchs_to_the_ends_of_the_range(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -100.0, -87.5, -20.0, -1.0, 0.0, 1.0, 20.0, 88.5, 100.0, 1e30])
    gate_up = torch.cat([gate, _random(len(gate))]).to(dtype).unsqueeze(0)
    output = torch.empty(1, len(gate), dtype=dtype)

    kernels.silu_product(array_of(gate_up), array_of(output))

    gates, ups = gate_up.chunk(2, dim=1)
    _assert_close(output, functional.silu(gates) * ups)


@both
@some_rows
def test_the_gradient_of_rms_norm_is_autograds(rows: int, dtype: torch.dtype) -> None:
    x, weight = _random(rows, 24, dtype=dtype), _random(24, seed=1)
    gradient, added = (_random(rows, 24, dtype=dtype, seed=seed) for seed in (2, 3))
    leaf = x.float().clone().requires_grad_()
    (functional.rms_norm(leaf, (24,), eps=1e-5) * weight * gradient.float()).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    expected = added.float() + leaf.grad

    arrays = (weight.numpy(), np.float32(1e-5), array_of(gradient), array_of(added))
    kernels.rms_norm_gradient(array_of(x), *arrays)

    _assert_close(added, expected)


@both
def test_the_gradient_of_heads_that_are_normalized_is_autograds(dtype: torch.dtype) -> None:
    heads, weight = _random(3, 5, 8, dtype=dtype), _random(8, seed=1)
    gradient = _random(3, 5, 8, dtype=dtype, seed=2)
    leaf = heads.float().clone().requires_grad_()
    (functional.rms_norm(leaf, (8,), eps=1e-5) * weight * gradient.float()).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    expected = gradient.float()
    expected[:, 1:3] = leaf.grad[:, 1:3]

    arrays = array_of(heads), array_of(gradient)
    kernels.rms_norm_heads_gradient(*arrays, 1, 3, weight.numpy(), np.float32(1e-5))

    _assert_close(gradient, expected)


@both
def test_the_gradient_of_silu_product_is_autograds(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -100.0, -87.5, -20.0, -1.0, 0.0, 1.0, 20.0, 88.5, 100.0, 1e4])
    gate_up = torch.cat([gate, _random(len(gate))]).to(dtype).unsqueeze(0)
    gradient = _random(1, len(gate), dtype=dtype, seed=1)
    leaf = gate_up.float().clone().requires_grad_()
    gates, ups = leaf.chunk(2, dim=1)
    (functional.silu(gates) * ups * gradient.float()).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    output = torch.empty_like(gate_up)

    kernels.silu_product_gradient(array_of(gate_up), array_of(gradient), array_of(output))

    _assert_close(output, leaf.grad)


@both
@pytest.mark.parametrize("columns", [1, 63, 64, 200])  # beside and within the lanes of a maximum
def test_log_sum_exp_is_torchs(columns: int, dtype: torch.dtype) -> None:
    x = _random(3, columns, dtype=dtype) * 30
    output = torch.empty(3)

    kernels.log_sum_exp(array_of(x), array_of(output))

    torch.testing.assert_close(output, x.float().logsumexp(-1))


def test_the_log_sum_exp_of_weights_that_diverged_is_not_a_number() -> None:
    x = torch.full((1, 100), math.nan)
    output = torch.zeros(1)

    kernels.log_sum_exp(array_of(x), array_of(output))

    assert output.isnan().all()


@both
def test_the_gradient_of_log_softmax_is_autograds(dtype: torch.dtype) -> None:
    logits = _random(5, 70, dtype=dtype) * 5
    rows, targets = torch.tensor([1, 3, 3, 3]), torch.tensor([4, 69, 0, 69])
    gradient = torch.tensor([1.0, -2.0, 0.5, 0.25])
    leaf = logits.float().clone().requires_grad_()
    (leaf.log_softmax(-1)[rows, targets] * gradient).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    wanted, starts = torch.tensor([1, 3]), torch.tensor([0, 1, 4])
    total = logits.float().logsumexp(-1)

    some = (logits, total, wanted, starts, targets, gradient)
    kernels.log_softmax_gradient(*(array_of(tensor) for tensor in some))

    _assert_close(logits[:2], leaf.grad[wanted])


@both
@pytest.mark.parametrize("before", [0, 5])
def test_causal_softmax_is_that_of_the_keys_which_a_query_may_see(
    before: int, dtype: torch.dtype
) -> None:
    scores = _random(3, 4, before + 4) * 20
    output = torch.full(scores.shape, math.nan, dtype=dtype)

    kernels.causal_softmax(array_of(scores), array_of(output))

    later = torch.ones(4, before + 4, dtype=torch.bool).triu(before + 1)
    _assert_close(output, scores.masked_fill(later, -math.inf).softmax(-1))


@both
def test_the_gradient_of_softmax_is_autograds(dtype: torch.dtype) -> None:
    scores, gradient = _random(3, 4, 9), _random(3, 4, 9, dtype=dtype, seed=1)
    p = (scores * 0.5).softmax(-1).to(dtype)
    leaf = p.float().log().div(0.5).requires_grad_()  # of what p is after its rounding
    ((leaf * 0.5).softmax(-1) * gradient.float()).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None

    kernels.softmax_gradient(array_of(p), array_of(gradient), np.float32(0.5))

    torch.testing.assert_close(
        gradient.float(), leaf.grad, atol=torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps
    )


@both
@some_rows
@pytest.mark.parametrize("rank", [1, 4, 7, 32])
@pytest.mark.parametrize("sizes", [(10,), (12, 5, 5)], ids=["one layer", "three layers"])
def test_low_rank_products_are_added_to_each_layers_output(
    rows: int, rank: int, sizes: Sequence[int], dtype: torch.dtype
) -> None:
    x, output = _random(rows, 20, dtype=dtype), _random(rows, sum(sizes), dtype=dtype, seed=1)
    a = (_random(len(sizes) * rank, 20, seed=2) / 4).to(dtype)
    b = (_random(rank, sum(sizes), seed=3) / 4).to(dtype)
    low = (x.float() @ a.float().t()).to(dtype).float().split(rank, dim=1)
    parts = [part @ some.float() for part, some in zip(low, b.split(list(sizes), 1), strict=True)]
    expected = output.float() + torch.cat(parts, dim=1)

    kernels.add_low_rank(array_of(x), array_of(a), array_of(b), np.array(sizes), array_of(output))

    # A rounding of A x to the other side is seen through B.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, rtol=2 * eps, atol=20 * eps)


@both
@some_rows
@pytest.mark.parametrize("prompt", [0, 1, 6])
@pytest.mark.parametrize("groups", [1, 3])
def test_rows_attend_to_their_prompt_and_to_themselves(
    rows: int, prompt: int, groups: int, dtype: torch.dtype
) -> None:
    key_heads, width, first, scale = 2, 8, 2, 0.3
    heads = _random(rows, (groups + 2) * key_heads, width, dtype=dtype)
    places = np.arange(rows) % 5
    kept = _random(2, first + rows, key_heads, 6, width, seed=1)
    before = _random(2, key_heads, prompt, width, seed=2)
    unchanged = kept.clone()
    output = torch.empty(rows, groups * key_heads, width, dtype=dtype)

    kernels.attend(
        array_of(heads),
        kept.numpy(),
        first,
        places,
        before.numpy(),
        np.float32(scale),
        array_of(output),
    )

    q, k, v = heads.float().split([groups * key_heads, key_heads, key_heads], dim=1)
    for row, place in enumerate(places):
        unchanged[:, first + row, :, place] = torch.stack([k[row], v[row]])
        held = unchanged[:, first + row, :, : place + 1]
        keys, values = torch.cat([before, held], dim=2)
        alone = functional.scaled_dot_product_attention(
            q[row].unsqueeze(1), keys, values, scale=scale, enable_gqa=True
        )
        _assert_close(output[row], alone[:, 0])
    assert torch.equal(kept, unchanged), "something else was written"


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 33, 40])
def test_a_row_comes_out_the_same_whatever_is_beside_it(rows: int) -> None:
    x, output = _random(50, 24), _random(50, 10, seed=1)
    a, b = _random(7, 24, seed=2), _random(7, 10, seed=3)
    heads, kept = _random(50, 5, 8), _random(2, 50, 1, 6, 8, seed=1)
    prompt, seen = _random(2, 1, 9, 8, seed=2), torch.empty(50, 3, 8)

    def computed(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        added, held, found = output[:count].clone(), kept.clone(), seen[:count].clone()
        arrays = [array_of(tensor) for tensor in (x[:count], a, b)]
        kernels.add_low_rank(*arrays, np.array([10]), array_of(added))
        arrays = [array_of(tensor) for tensor in (heads[:count], held, prompt, found)]
        places = np.full(count, 4)
        kernels.attend(arrays[0], arrays[1], 0, places, arrays[2], np.float32(0.3), arrays[3])
        return added, found

    for some, all_ in zip(computed(rows), computed(50), strict=True):
        assert torch.equal(some, all_[:rows])


@both
def test_numbers_that_are_none_stay_so(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]]).to(dtype)
    output = torch.empty_like(x)

    kernels.rms_norm(array_of(x), np.ones(2, np.float32), np.float32(1e-5), array_of(output))

    assert output.isnan().tolist() == [[True, True], [False, False]]
