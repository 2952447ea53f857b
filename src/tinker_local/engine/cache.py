"""Keys and values of the sequences that are being sampled together.

Each sequence has a row of its own. Rows that continue the same prompt stand together, as a block,
and on a CPU their prompt's keys and values are kept once: 32 rows after a prompt of 100 tokens
attend in half the time, since the prompt is read once and not 32 times (Juravsky 2024, Hydragen).
Buffers grow in steps.

On a CPU keys and values are float32, whatever the model's format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

from tinker_local.engine.next_tokens import Block, LayerState, NextTokens, OnCpu, OnGpu

_ROWS_STEP, _TOKENS_STEP = 8, 64

_MIN_SAVED = 256  # tokens; below, the products of a shared prompt cost more than they save


def is_shared(device: torch.device, rows: int, tokens: int) -> bool:
    """Whether so many rows keep a prompt of so many tokens once."""
    return device.type == "cpu" and (rows - 1) * tokens >= _MIN_SAVED


def kept_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The number format of keys and values of a model that computes in `dtype`."""
    return torch.float32 if device.type == "cpu" else dtype


@dataclass
class _Block:
    """Neighbouring rows, and the keys and values, by layer, that precede what each row holds."""

    rows: int
    prompt: Sequence[torch.Tensor]  # (2, key-value heads, P, D) each; P is 0 if nothing does


class KeyValueCache:
    """Buffers of shape (2, rows, key-value heads, tokens, D), keys before values, one a layer."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Tokens held in each row in use, without those it shares."""
        self._blocks: list[_Block] = []
        self._layers: list[torch.Tensor] = []

    def append(self, layers: Sequence[LayerState], copies: int) -> None:
        """Add rows that all hold the same tokens, each by itself."""
        tokens = layers[0][0].shape[1]
        first, last = len(self.lengths), len(self.lengths) + copies
        nothing = [k.new_empty(2, len(k), 0, k.shape[2]) for k, _ in layers]
        self._add(_Block(copies, nothing), layers, tokens)
        for buffer, (k, v) in zip(self._layers, layers, strict=True):
            buffer[0, first:last, :, :tokens] = k
            buffer[1, first:last, :, :tokens] = v

    def append_shared(self, layers: Sequence[LayerState], rows: int) -> None:
        """Add rows that all continue the same tokens, which are kept once."""
        self._add(_Block(rows, [torch.stack(layer) for layer in layers]), layers, 0)

    def _add(self, block: _Block, layers: Sequence[LayerState], tokens: int) -> None:
        if not self._layers:
            heads, _, width = layers[0][0].shape
            self._layers = [k.new_empty(2, 0, heads, 0, width) for k, _ in layers]
        self._blocks.append(block)
        self.lengths += [tokens] * block.rows
        self._reserve(len(self.lengths), tokens + 1)

    def _reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of so many tokens."""
        _, held_rows, _, held_tokens, _ = self._layers[0].shape
        if rows <= held_rows and tokens <= held_tokens:
            return
        more_rows = max(held_rows, -(-rows // _ROWS_STEP) * _ROWS_STEP if rows > 1 else 1)
        more_tokens = max(held_tokens, -(-tokens // _TOKENS_STEP) * _TOKENS_STEP)
        padding = (0, 0, 0, more_tokens - held_tokens, 0, 0, 0, more_rows - held_rows)
        self._layers = [functional.pad(buffer, padding) for buffer in self._layers]

    def remove(self, row: int) -> list[tuple[int, int]]:
        """Drop a row, and move others so that blocks stay together and no place is empty.

        Returns:
            From where to where rows moved, one after the other; the last place is free then.
        """
        moves = []
        for block, (first, end) in zip(self._blocks, list(self._bounds()), strict=True):
            if row >= end:
                continue
            if first <= row:
                block.rows -= 1
            if row != end - 1:
                self._move(end - 1, row)
                moves.append((end - 1, row))
            row = end - 1  # free now; the next block's last row moves there
        self.lengths.pop()
        self._blocks = [block for block in self._blocks if block.rows]
        return moves

    def _move(self, source: int, target: int) -> None:
        held = self.lengths[source]
        for buffer in self._layers:
            buffer[:, target, :, :held] = buffer[:, source, :, :held]
        self.lengths[target] = held

    def _bounds(self) -> Iterator[tuple[int, int]]:
        """First row and end of each block."""
        ends = [0]
        for block in self._blocks:
            ends.append(ends[-1] + block.rows)
        return pairwise(ends)

    def next_tokens(self, device: torch.device) -> NextTokens:
        """The layout of one more token a row; afterwards each row is one longer."""
        self._reserve(len(self.lengths), max(self.lengths) + 1)
        layout: NextTokens
        if device.type == "cpu":
            layout = OnCpu(self._layers, self.lengths, self._laid_out())
        else:
            layout = OnGpu(self._layers, self.lengths, device)
        self.lengths = [length + 1 for length in self.lengths]
        return layout

    def _laid_out(self) -> list[Block]:
        """Blocks and their rows; neighbours without a prompt of their own are one."""
        found: list[Block] = []
        for (first, end), block in zip(self._bounds(), self._blocks, strict=True):
            if found and not block.prompt[0].shape[2] and not found[-1].prompt[0].shape[2]:
                found[-1] = Block(slice(found[-1].rows.start, end), block.prompt)
            else:
                found.append(Block(slice(first, end), block.prompt))
        return found
