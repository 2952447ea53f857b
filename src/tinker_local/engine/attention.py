"""Attention for what tinker-local's batches look like, registered with transformers.

transformers' models call the attention function that their config names. Ours leaves the work to
the `Layout` that came with the forward pass, since only that knows which token may see which:
sequences packed without padding (`packed`), or rows that each grow by one token (`next_tokens`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tinker_local.errors import NotServedError

NAME = "tinker_local"
"""What a model's config names as its attention implementation to be sent here."""


class Layout(ABC):
    """Which token may see which, for one forward pass over a row of T tokens."""

    @property
    @abstractmethod
    def positions(self) -> torch.Tensor:
        """Place of each token in its own sequence, (T,), int64."""

    @abstractmethod
    def attend_rows(
        self, layer: int, heads: torch.Tensor, key_heads: int, scale: float
    ) -> torch.Tensor:
        """Attend within one layer.

        Args:
            layer: Its index, 0 for the first.
            heads: Queries, keys (both rotated) and values of each token, end to end,
                (T, heads + 2 * key-value heads, D), contiguous.
            key_heads: How many key-value heads there are.
            scale: What the scores are multiplied by.

        Returns:
            (T, heads, D).
        """

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The same with the heads first, as transformers has them.

        Args:
            layer: As above.
            q: Queries, (1, heads, T, D), rotated.
            k: Keys of the same tokens, (1, key-value heads, T, D), rotated.
            v: Values, like k.
            scale: As above.

        Returns:
            (1, heads, T, D).
        """
        heads = torch.cat([q, k, v], dim=1)[0].transpose(0, 1).contiguous()
        return self.attend_rows(layer, heads, k.shape[1], scale).transpose(0, 1).unsqueeze(0)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer; see its AttentionInterface."""
    del attention_mask
    if softcap is not None or s_aux is not None:
        raise NotServedError(
            f"{type(module).__name__} caps its scores or has attention sinks.",
            "tinker-local serves models with plain softmax attention: Llama, Qwen, SmolLM ...",
        )
    if sliding_window is not None and int(layout.positions.max()) >= sliding_window:
        raise NotServedError(
            f"{type(module).__name__} looks back over {sliding_window} tokens only.",
            f"Keep sequences within {sliding_window} tokens.",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(module.layer_idx, query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
# Layouts know their masks; any that transformers would make is not used.
AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)
