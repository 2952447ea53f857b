"""Sequences that share a forward pass without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tinker_local.engine.attention import Layout
from tinker_local.engine.autograd import applied
from tinker_local.engine.causal import causal


class PackedSequences(Layout):
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
        own_places = torch.where(is_real, starts + steps, sum(lengths)).flatten()
        self._padded = own_places.to(device)  # (B * S,): of each padded token; the end for padding
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

    def attend_rows(
        self, layer: int, heads: torch.Tensor, key_heads: int, scale: float
    ) -> torch.Tensor:
        """See `Layout.attend_rows`."""
        del layer
        sizes = [heads.shape[1] - 2 * key_heads, key_heads, key_heads]
        q, k, v = torch.split(self._pad(heads), sizes, dim=1)  # (B, heads, S, D) each
        if self.prefix == 0:
            return self._pack(causal(q, k, v, None, scale))
        before = heads[: self.prefix].transpose(0, 1).unsqueeze(0)
        first_q, first_k, first_v = torch.split(before, sizes, dim=1)
        first = causal(first_q, first_k, first_v, None, scale)[0].transpose(0, 1)
        k, v = self._after(first_k, k), self._after(first_v, v)
        return torch.cat([first, self._pack(causal(q, k, v, self._allowed, scale))])

    def _after(self, shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The prefix before each sequence, (B, key-value heads, prefix + S, D)."""
        return torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=2)

    def _pad(self, heads: torch.Tensor) -> torch.Tensor:
        """(T, heads, D) to (B, heads, S, D); padding is zero, and never read."""
        own = heads[self.prefix :]
        if self._places is not None:
            own = applied(_Pad, own, self._padded, self._places)
        return own.view(len(self.lengths), -1, *own.shape[1:]).transpose(1, 2)

    def _pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, heads, S, D) to (T - prefix, heads, D)."""
        own = padded.transpose(1, 2).flatten(0, 1)  # (B * S, heads, D)
        return own if self._places is None else applied(_Pack, own, self._padded, self._places)


def _padded(rows: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    """Rows (M, ...) at places up to M, where there is a row of zeros."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]).index_select(0, padded)


class _Pad(torch.autograd.Function):
    """Packed rows to padded ones. torch's own gradient of an index costs 3 % of a step, and
    `index_select` takes a seventh of the time of an index."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, padded: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(places)
        return _padded(rows, padded)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


class _Pack(torch.autograd.Function):
    """Padded rows to packed ones."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, padded: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(padded)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _padded(gradient, *ctx.saved_tensors), None, None
