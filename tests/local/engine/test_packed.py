from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from tinker_local.engine.packed import PackedSequences

HEADS, KEY_VALUE_HEADS, WIDTH = 4, 2, 8
SCALE = 0.3

LAYOUTS = {
    "one sequence": (0, [5]),
    "equal lengths": (0, [6, 6, 6]),
    "unequal lengths": (0, [3, 7, 1]),
    "a shared prefix, equal lengths": (4, [5, 5]),
    "a shared prefix, unequal lengths": (4, [2, 6, 1]),
    "a shared prefix of one sequence": (4, [3]),
    "more than the 128 queries of a block": (0, [300, 129, 128]),
    "more than 128 queries after a prefix": (150, [131, 257, 2]),
}


def _packed(prefix: int, lengths: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Random queries, keys and values of a packed row, each (1, heads, T, D)."""
    generator = torch.Generator().manual_seed(0)
    total = prefix + sum(lengths)
    return [
        torch.randn(1, heads, total, WIDTH, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
    ]


def _alone(prefix: int, lengths: Sequence[int], qkv: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each sequence by itself, the prefix before it, in float32 through torch's own attention."""
    parts = []
    start = prefix
    for number, length in enumerate(lengths):
        places = [*range(prefix), *range(start, start + length)]
        q, k, v = (tensor[:, :, places].float() for tensor in qkv)
        output = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=SCALE, enable_gqa=True
        )
        if number == 0:
            parts.append(output[:, :, :prefix])
        parts.append(output[:, :, prefix:])
        start += length
    return torch.cat(parts, dim=2)


def _both(layout: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients of q, k, v: ours, and of each sequence alone in float32."""
    prefix, lengths = LAYOUTS[layout]
    qkv = _packed(prefix, lengths, dtype)
    weights = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = PackedSequences(prefix, lengths, torch.device("cpu")).attend(0, *qkv, SCALE)
    theirs = _alone(prefix, lengths, qkv)
    return (
        [ours.detach(), *torch.autograd.grad((ours * weights).sum(), qkv)],
        [theirs.detach(), *torch.autograd.grad((theirs * weights).sum(), qkv)],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_sequences_attend_as_each_does_alone(layout: str) -> None:
    ours, theirs = _both(layout, torch.float32)

    for name, one, other in zip(("output", "dq", "dk", "dv"), ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_sequences_in_bfloat16_are_within_two_percent(layout: str) -> None:
    ours, theirs = _both(layout, torch.bfloat16)

    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 0.02


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_gradient_the_output_is_the_same(layout: str) -> None:
    prefix, lengths = LAYOUTS[layout]
    qkv = _packed(prefix, lengths, torch.float32)
    packed = PackedSequences(prefix, lengths, torch.device("cpu"))

    with torch.no_grad():
        output = packed.attend(0, *qkv, SCALE)

    torch.testing.assert_close(output, packed.attend(0, *qkv, SCALE), atol=1e-5, rtol=1e-5)


def test_what_one_sequence_holds_does_not_reach_another() -> None:
    packed = PackedSequences(2, [3, 4], torch.device("cpu"))
    q, k, v = (tensor.detach() for tensor in _packed(2, [3, 4], torch.float32))
    before = packed.attend(0, q, k, v, SCALE)
    k[:, :, 5:], v[:, :, 5:] = 100.0, 100.0  # the second sequence's

    after = packed.attend(0, q, k, v, SCALE)

    assert torch.equal(after[:, :, :5], before[:, :, :5])
    assert not torch.allclose(after[:, :, 5:], before[:, :, 5:])


def test_every_sequence_counts_its_positions_from_the_prefix_on() -> None:
    packed = PackedSequences(3, [2, 4], torch.device("cpu"))

    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6]
