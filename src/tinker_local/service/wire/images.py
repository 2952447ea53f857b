"""Images among the tokens of a model input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from tinker_local.ops import Image, Tokens

Part: TypeAlias = Tokens | Image
"""A piece of a model input: tokens, or an image whose `at` is not yet known."""


def joined(parts: Sequence[Part]) -> tuple[Tokens, Sequence[Image]]:
    """The tokens of the text, (N,), and the images with their places among them."""
    texts: list[Tokens] = [np.empty(0, np.int64)]
    images: list[Image] = []
    length = 0
    for part in parts:
        if isinstance(part, Image):
            images.append(Image(length, part.data, part.format, part.expected_tokens))
        else:
            texts.append(part.astype(np.int64))
            length += len(part)
    return np.concatenate(texts), images
