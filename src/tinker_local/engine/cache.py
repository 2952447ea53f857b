"""Keys and values of the sequences that are being sampled together.

Each sequence has a row of its own. Buffers grow in steps, and a row that ends is filled with the
last one, so that those in use are always the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

_ROWS_STEP, _TOKENS_STEP = 8, 128

LayerState = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, (key-value heads, T, D) each."""


class KeyValueCache:
    """Buffers of shape (rows, key-value heads, tokens, D), two a layer."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Tokens held in each row in use."""
        self._layers: list[LayerState] = []

    def append(self, layers: Sequence[LayerState], copies: int) -> None:
        """Add rows that all hold the same tokens."""
        tokens = layers[0][0].shape[1]
        first, last = len(self.lengths), len(self.lengths) + copies
        if not self._layers:
            self._layers = [
                (
                    k.new_empty(0, k.shape[0], 0, k.shape[2]),
                    v.new_empty(0, v.shape[0], 0, v.shape[2]),
                )
                for k, v in layers
            ]
        self.reserve(last, tokens + 1)
        for (keys, values), (k, v) in zip(self._layers, layers, strict=True):
            keys[first:last, :, :tokens] = k
            values[first:last, :, :tokens] = v
        self.lengths += [tokens] * copies

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of so many tokens."""
        held_rows, _, held_tokens, _ = self._layers[0][0].shape
        if rows <= held_rows and tokens <= held_tokens:
            return
        more_rows = max(held_rows, -(-rows // _ROWS_STEP) * _ROWS_STEP if rows > 1 else 1)
        more_tokens = max(held_tokens, -(-tokens // _TOKENS_STEP) * _TOKENS_STEP)
        padding = (0, 0, 0, more_tokens - held_tokens, 0, 0, 0, more_rows - held_rows)
        self._layers = [
            (functional.pad(keys, padding), functional.pad(values, padding))
            for keys, values in self._layers
        ]

    def remove(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row < last:
            for keys, values in self._layers:
                keys[row] = keys[last]
                values[row] = values[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def next_tokens(self, device: torch.device) -> NextTokens:
        """The layout of one more token a row; afterwards each row is one longer."""
        self.reserve(len(self.lengths), max(self.lengths) + 1)
        layout = NextTokens(self._layers, self.lengths, device)
        self.lengths = [length + 1 for length in self.lengths]
        return layout


class NextTokens:
    """A row of R tokens, each the next one of a sequence whose keys and values are kept."""

    def __init__(
        self, layers: Sequence[LayerState], lengths: Sequence[int], device: torch.device
    ) -> None:
        self._layers = layers
        self._rows = torch.arange(len(lengths), device=device)
        self._positions = torch.tensor(lengths, device=device)
        self._seen = max(lengths) + 1
        places = torch.arange(self._seen, device=device)
        self._allowed = (places <= self._positions.unsqueeze(1))[:, None, None]  # (R, 1, 1, L)
        self._bias: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        return self._positions

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `attention.Layout`; keeps the new keys and values."""
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
        return self.attend_rows(layer, q, k, v, scale).transpose(0, 1).unsqueeze(0)

    def attend_rows(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The same with the rows first.

        Args:
            layer: Its index, 0 for the first.
            q: Queries, (R, heads, D), rotated.
            k: Keys, (R, key-value heads, D), rotated.
            v: Values, like k.
            scale: What the scores are multiplied by.

        Returns:
            (R, heads, D).
        """
        keys, values = self._layers[layer]
        count, heads, width = q.shape
        keys[self._rows, :, self._positions] = k
        values[self._rows, :, self._positions] = v
        if self._bias is None:
            self._bias = torch.zeros_like(self._allowed, dtype=q.dtype)
            self._bias.masked_fill_(~self._allowed, -torch.inf)
        # The query heads that share a key-value head stand where other tokens' queries would.
        output = functional.scaled_dot_product_attention(
            q.reshape(count, k.shape[1], heads // k.shape[1], width),
            keys[:count, :, : self._seen],
            values[:count, :, : self._seen],
            attn_mask=self._bias,
            scale=scale,
        )
        return output.reshape(count, heads, width)
