"""Attention of one more token a row to the keys and values that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from tinker_local.engine import kernels
from tinker_local.engine.attention import Layout
from tinker_local.engine.kernels import array_of

LayerState = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, (key-value heads, T, D) each."""


class NextTokens(Layout):
    """A row of R tokens, each the next one of a sequence whose keys and values are kept."""

    def __init__(self, layers: Sequence[torch.Tensor], positions: torch.Tensor) -> None:
        """Take the cache's buffers, and each token's place in its sequence, (R,), int64."""
        self._layers = layers
        self._positions = positions

    @property
    def positions(self) -> torch.Tensor:
        return self._positions


class OnGpu(NextTokens):
    """Rows that each hold all of their sequence, padded to the longest."""

    def __init__(
        self, layers: Sequence[torch.Tensor], lengths: Sequence[int], device: torch.device
    ) -> None:
        """Lay out rows that hold `lengths` tokens, in buffers as in the cache."""
        self._own = torch.tensor(lengths, device=device)  # place of the new token in its row
        super().__init__(layers, self._own)
        self._rows = torch.arange(len(lengths), device=device)
        self._seen = max(lengths) + 1
        places = torch.arange(self._seen, device=device)
        later = (places > self._own.unsqueeze(1))[:, None, None]  # (R, 1, 1, T)
        self._mask = torch.zeros_like(later, dtype=layers[0].dtype).masked_fill_(later, -torch.inf)

    def attend_rows(
        self, layer: int, heads: torch.Tensor, key_heads: int, scale: float
    ) -> torch.Tensor:
        buffer, count = self._layers[layer], len(heads)
        new = heads[:, -2 * key_heads :].reshape(count, 2, key_heads, -1)
        buffer[:, self._rows, :, self._own] = new.to(buffer.dtype)
        keys, values = buffer[:, :count, :, : self._seen]  # (R, K, T, D) each
        queries = heads[:, : -2 * key_heads]
        # The query heads that share a key-value head stand where other tokens' queries would.
        grouped = queries.reshape(count, key_heads, -1, heads.shape[2])
        output = functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=self._mask, scale=scale
        )
        return output.reshape(queries.shape)


@dataclass(frozen=True)
class Block:
    """Neighbouring rows, and what precedes all that they hold.

    Attributes:
        prompt: Keys and values by layer, (2, key-value heads, P, D) each; P may be 0.
    """

    rows: slice
    prompt: Sequence[torch.Tensor]


class OnCpu(NextTokens):
    """Rows that hold their sequence, or what is beyond the prompt of their block."""

    def __init__(
        self, layers: Sequence[torch.Tensor], lengths: Sequence[int], blocks: Sequence[Block]
    ) -> None:
        """Lay out rows that hold `lengths` tokens by themselves, in buffers as in the cache."""
        self._places = np.array(lengths)  # of the new tokens in their rows
        positions = self._places.copy()
        for block in blocks:
            positions[block.rows] += block.prompt[0].shape[2]
        super().__init__(layers, torch.from_numpy(positions))
        self._blocks = blocks

    def attend_rows(
        self, layer: int, heads: torch.Tensor, key_heads: int, scale: float
    ) -> torch.Tensor:
        output = heads.new_empty(len(heads), heads.shape[1] - 2 * key_heads, heads.shape[2])
        new, kept, seen = (array_of(tensor) for tensor in (heads, self._layers[layer], output))
        for block in self._blocks:
            rows, prompt = block.rows, array_of(block.prompt[layer])
            places = self._places[rows]
            kernels.attend(
                new[rows], kept, rows.start, places, prompt, np.float32(scale), seen[rows]
            )
        return output
