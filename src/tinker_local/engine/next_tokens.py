"""Attention of one more token a row to the keys and values that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

LayerState = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, (key-value heads, T, D) each."""


@dataclass(frozen=True)
class SharedPrompt:
    """Keys and values, by layer, that precede what each of these rows holds."""

    rows: slice
    layers: Sequence[LayerState]

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[1]


class NextTokens:
    """A row of R tokens, each the next one of a sequence whose keys and values are kept.

    On a CPU the scores of the shared prompts, P tokens at most, stand before those of what each
    row holds by itself, T tokens at most, and one softmax is over both.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        lengths: Sequence[int],
        shared: Sequence[SharedPrompt],
        device: torch.device,
    ) -> None:
        """Lay out rows that hold `lengths` tokens by themselves, in buffers as in the cache."""
        self._layers = layers
        self._shared = shared
        self._rows = torch.arange(len(lengths), device=device)
        self._own = torch.tensor(lengths, device=device)  # place of the new token in its row
        self._same = lengths[0] if min(lengths) == max(lengths) else None
        self._seen = max(lengths) + 1
        before = self._own.clone()
        for prompt in shared:
            before[prompt.rows] += prompt.tokens
        self._positions = before
        self._most_shared = max((prompt.tokens for prompt in shared), default=0)
        self._bias: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        return self._positions

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `attention.Layout`; keeps the new keys and values."""
        heads = torch.cat([q, k, v], dim=1)[0].transpose(0, 1)  # (R, heads and 2 * K, D)
        return self.attend_rows(layer, heads, k.shape[1], scale).transpose(0, 1).unsqueeze(0)

    def attend_rows(
        self, layer: int, heads: torch.Tensor, key_heads: int, scale: float
    ) -> torch.Tensor:
        """The same with the rows first.

        Args:
            layer: Its index, 0 for the first.
            heads: Queries, keys (both rotated) and values of each row, end to end,
                (R, heads + 2 * key-value heads, D).
            key_heads: How many key-value heads there are.
            scale: What the scores are multiplied by.

        Returns:
            (R, heads, D).
        """
        own = self._keep(layer, heads[:, -2 * key_heads :])  # (2, R, K, T, D)
        queries = heads[:, : -2 * key_heads]
        # The query heads that share a key-value head stand where other tokens' queries would.
        grouped = (len(heads), key_heads, -1, heads.shape[2])
        if heads.device.type == "cpu":
            scaled = queries * torch.tensor([scale], dtype=own.dtype)  # one call for both changes
            output = self._on_cpu(layer, scaled.reshape(grouped), own)
            return output.view(queries.shape).to(heads.dtype)
        output = functional.scaled_dot_product_attention(
            queries.reshape(grouped), own[0], own[1], attn_mask=self._mask(own), scale=scale
        )
        return output.reshape(queries.shape)

    def _keep(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """Write keys and values (R, 2 * K, D) of the new tokens; all that rows hold themselves."""
        buffer = self._layers[layer]
        count, key_heads = len(new), buffer.shape[2]
        new = new.reshape(count, 2, key_heads, -1)  # (R, 2, K, D)
        if self._same is None:
            buffer[:, self._rows, :, self._own] = new.to(buffer.dtype)
        else:  # a slice is written in a fifth of the time
            buffer[:, :count, :, self._same] = new.transpose(0, 1)
        return buffer[:, :count, :, : self._seen]

    def _mask(self, own: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of each row's own tokens, (R, 1, 1, T): 0, or -infinity."""
        if self._bias is None:
            places = torch.arange(self._seen, device=own.device)
            later = (places > self._own.unsqueeze(1))[:, None, None]
            bias = torch.zeros_like(later, dtype=own.dtype)
            self._bias = bias.masked_fill_(later, -torch.inf)
        return self._bias

    def _on_cpu(self, layer: int, q: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Attention of scaled queries (R, K, G, D) to own keys and values, and to the shared."""
        count, key_heads, groups, width = q.shape
        keys, values = own.flatten(1, 2)  # (R * K, T, D) each
        scores = torch.bmm(q.reshape(-1, groups, width), keys.transpose(1, 2))
        scores = scores.view(count, key_heads, groups, -1)
        if self._same is None:
            scores += self._mask(own)
        if self._shared:
            scores = torch.cat([self._shared_scores(layer, q), scores], dim=-1)
        p = scores.softmax(-1)  # (R, K, G, P + T)
        p_own = p[..., self._most_shared :].flatten(0, 1)  # (R * K, G, T)
        output = torch.bmm(p_own, values).view(q.shape)
        for prompt in self._shared:
            some = p[prompt.rows, ..., : prompt.tokens].transpose(0, 1).flatten(1, 2)
            seen = torch.bmm(some, prompt.layers[layer][1])  # (K, rows * G, D)
            output[prompt.rows] += seen.view(key_heads, -1, groups, width).transpose(0, 1)
        return output

    def _shared_scores(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Scores (R, K, G, P) of the shared prompts, minus infinity beyond a row's own."""
        count, key_heads, groups, width = q.shape
        scores = q.new_empty(0)
        for prompt in self._shared:
            some = q[prompt.rows].transpose(0, 1).reshape(key_heads, -1, width)
            found = torch.bmm(some, prompt.layers[layer][0].transpose(1, 2))
            found = found.view(key_heads, -1, groups, prompt.tokens).transpose(0, 1)
            if len(found) == count:
                return found
            if not scores.numel():
                scores = q.new_full((count, key_heads, groups, self._most_shared), -torch.inf)
            scores[prompt.rows, ..., : prompt.tokens] = found
        return scores
