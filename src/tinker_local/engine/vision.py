"""A base model that reads images: a frozen vision tower before a language model.

Only the language model is adapted. The tower makes embeddings of an image, which stand in the
row where those of its tokens would, and features that are added to the hidden states there in the
first layers (DeepStack). One sequence at a time, through transformers' own layers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from PIL import Image as Pictures
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinker_local.engine.base_model import BaseModel, LanguageModel
from tinker_local.errors import UserInputError
from tinker_local.ops import BaseModelInfo, Image, Tokens

MAX_PIXELS = 64_000_000
"""Of one image before it is scaled; 200 MB as it is decoded."""

_FORMATS = ("PNG", "JPEG")


@dataclass(frozen=True)
class Read:
    """A sequence that was read.

    Attributes:
        hidden: Last hidden states, (N, H).
        next_position: Rotary position of the token that follows; an image's tokens share a few.
    """

    hidden: torch.Tensor
    next_position: int


class VisionModel(LanguageModel):
    """A Qwen3-VL from a Hugging Face folder, ready to be adapted."""

    def __init__(self, info: BaseModelInfo, dtype: torch.dtype, device: torch.device) -> None:
        module: Any = AutoModelForImageTextToText.from_pretrained(
            info.folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa"
        )
        super().__init__(info, module, device)
        processor: Any = AutoImageProcessor
        self._processor: Any = processor.from_pretrained(info.folder, local_files_only=True)
        self._make_adaptable()

    def laid_out(
        self, tokens: Tokens, images: Sequence[Image], place: str
    ) -> tuple[Tokens, Sequence[Image]]:
        """See `LanguageModel.laid_out`."""
        pieces: list[Tokens] = []
        placed: list[Image] = []
        start = length = 0
        for number, image in enumerate(images, 1):
            what = f"{place}, image {number}"
            if number > 1 and image.at == start:
                raise UserInputError(
                    f"{what} follows the image before it without a token between.",
                    "Put each between <|vision_start|> and <|vision_end|>, as renderers do.",
                )
            count = self._token_count(image, what)
            length += image.at - start
            placed.append(replace(image, at=length, expected_tokens=count))
            pad = np.full(count, self._causal_lm.config.image_token_id, np.int64)
            pieces += [tokens[start : image.at], pad]
            start, length = image.at, length + count
        return np.concatenate([*pieces, tokens[start:]]), placed

    def read(
        self, tokens: Tokens, images: Sequence[Image], cache: DynamicCache | None = None
    ) -> Read:
        """Read a sequence that was `laid_out`; keys and values are kept in `cache`."""
        core = self._causal_lm.model
        row = torch.from_numpy(tokens).to(self.device).unsqueeze(0)  # (1, N)
        embedded = core.get_input_embeddings()(row)  # (1, N, H)
        is_image = torch.zeros_like(row, dtype=torch.bool)
        for image in images:
            is_image[0, image.at : image.at + (image.expected_tokens or 0)] = True
        grids = features = None
        if images:
            pixels, grids = self._pixels(images)
            with torch.no_grad():
                seen = core.get_image_features(pixels, grids, return_dict=True)
            features = seen.deepstack_features
            patches = torch.cat(seen.pooler_output).to(embedded.dtype)  # (image tokens, H)
            embedded = embedded.masked_scatter(is_image.unsqueeze(-1), patches)
        positions, _ = core.get_rope_index(
            row, mm_token_type_ids=is_image.int(), image_grid_thw=grids
        )  # (3, 1, N)
        output = core.language_model(
            inputs_embeds=embedded,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            visual_pos_masks=is_image if images else None,
            deepstack_visual_embeds=features,
        )
        return Read(output.last_hidden_state[0], int(positions.max()) + 1)

    def read_next(self, tokens: Sequence[int], position: int, cache: Cache) -> torch.Tensor:
        """Last hidden states (R, H) of one token more in each of the cache's rows."""
        row = torch.tensor(tokens, device=self.device).unsqueeze(1)  # (R, 1)
        output = self._causal_lm.model.language_model(
            input_ids=row,
            position_ids=torch.full((3, len(tokens), 1), position, device=self.device),
            past_key_values=cache,
            use_cache=True,
        )
        return cast("torch.Tensor", output.last_hidden_state[:, 0])

    def new_cache(self) -> DynamicCache:
        """Room for the keys and values of one request."""
        return DynamicCache(config=self._causal_lm.config.get_text_config())

    def _token_count(self, image: Image, what: str) -> int:
        """How many tokens the model makes of an image.

        Raises:
            UserInputError: It cannot be read, or the client takes it for another number.
        """
        picture = _decoded(image, what)
        width, height = picture.size
        try:
            patches = self._processor.get_number_of_image_patches(height, width, images_kwargs={})
        except ValueError as error:  # too long and narrow
            raise UserInputError(
                f"{what} ({width} x {height} pixels) cannot be scaled: {error}.", "Crop it."
            ) from None
        count = int(patches) // int(self._processor.merge_size) ** 2
        if image.expected_tokens not in (None, count):
            raise UserInputError(
                f"{what} ({width} x {height} pixels) has expected_tokens {image.expected_tokens}, "
                f"but {self.info.name} makes {count} tokens of it.",
                "Count with this model's own image processor, as the cookbook's renderers do.",
            )
        return count

    def _pixels(self, images: Sequence[Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches of all images (P, values a patch), and the grid of each, (images, 3)."""
        pictures = [_decoded(image, "image") for image in images]
        made = self._processor(images=pictures, return_tensors="pt")
        return made["pixel_values"].to(self.device), made["image_grid_thw"].to(self.device)


AnyModel: TypeAlias = BaseModel | VisionModel


def is_vision_model(folder: Path) -> bool:
    """Whether a model has a vision tower, by its config.json."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return getattr(config, "vision_config", None) is not None


def _decoded(image: Image, what: str) -> Pictures.Image:
    """The picture in RGB.

    Raises:
        UserInputError: It is in neither format, damaged, or too large.
    """
    try:
        picture = Pictures.open(io.BytesIO(image.data), formats=_FORMATS)
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise UserInputError(
                f"{what} has {width} x {height} pixels; {MAX_PIXELS:,} are the limit.", "Shrink it."
            )
        if str(picture.format).lower() != image.format:
            raise UserInputError(
                f"{what} is sent as {image.format!r}, but its data is a {picture.format}.",
                "Name the format that it has.",
            )
        return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Pictures.DecompressionBombError) as error:
        # PIL raises SyntaxError for a broken PNG.
        raise UserInputError(
            f"{what} cannot be read as {' or '.join(_FORMATS)}: {error}.",
            "Send the whole file's bytes; convert other formats.",
        ) from None
