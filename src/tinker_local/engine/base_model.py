"""A base model in memory: frozen weights, wrapped once for adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tinker_local.engine import attention, lora
from tinker_local.engine.attention import Layout
from tinker_local.engine.cache import kept_dtype
from tinker_local.engine.decoding import Decoder, can_decode
from tinker_local.engine.fused import FusedModel
from tinker_local.engine.layers import Layers, is_known
from tinker_local.engine.lora import Adapter, LoraLinear, wrap
from tinker_local.engine.packed import PackedSequences
from tinker_local.errors import ModelFolderError, NotServedError
from tinker_local.ops import BaseModelInfo, Image, Tokens

_PROBE = "The river that flows through the capital of France is the Seine; that of England"

_LOGITS_MAY_DIFFER = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Relative, in the norm. 30 layers in another order differ by 1.3e-6, in bfloat16 by 0.024."""


class LanguageModel:
    """What is the same in the models of text alone and in those that read images.

    Attributes:
        layers: The adaptable layers by dotted path.
        head: The layer that makes logits of hidden states.
    """

    layers: Mapping[str, LoraLinear]
    head: LoraLinear

    def __init__(self, info: BaseModelInfo, causal_lm: Any, device: torch.device) -> None:
        """Take a loaded model, which `_make_adaptable` has yet to wrap."""
        self.info = info
        self.device = device
        self._causal_lm: Any = causal_lm.requires_grad_(False).eval().to(device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(info.folder, local_files_only=True)

    def _make_adaptable(self) -> None:
        self.layers = wrap(cast("nn.Module", self._causal_lm))
        head = self._causal_lm.get_output_embeddings()
        self.head = head if isinstance(head, LoraLinear) else LoraLinear(head)

    def laid_out(
        self, tokens: Tokens, images: Sequence[Image], place: str
    ) -> tuple[Tokens, Sequence[Image]]:
        """Tokens (N,) with those of each image, and the images with the number of theirs.

        Args:
            tokens: Of the text alone.
            place: How an error calls them.

        Raises:
            UserInputError: This model cannot read such an image, or none at all.
        """
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._causal_lm.config.get_text_config().vocab_size)

    @property
    def cache_bytes_per_token(self) -> int:
        """What keys and values of one token take, in all layers."""
        config = self._causal_lm.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        whole = config.hidden_size // config.num_attention_heads
        width = getattr(config, "head_dim", None) or whole
        per_layer = 2 * heads * width * kept_dtype(self.device, self.head.weight.dtype).itemsize
        return int(config.num_hidden_layers * per_layer)

    @property
    def end_of_text(self) -> tuple[int, ...]:
        """The ids that end a sequence unless a request says otherwise."""
        ids = self._causal_lm.generation_config.eos_token_id
        if ids is None:
            ids = self._tokenizer.eos_token_id
        return (ids,) if isinstance(ids, int) else tuple(ids or ())

    @contextmanager
    def adapted(self, adapter: Adapter | None) -> Iterator[None]:
        """Apply `adapter` (None: the base model alone) to every forward pass in this block."""
        with lora.active(self.layers, adapter):
            yield

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores (..., vocabulary) of the next token, float32, from hidden states (..., H)."""
        return cast("torch.Tensor", self.head(hidden)).float()

    def text(self, tokens: list[int]) -> str:
        """The text of some token ids, special tokens included."""
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


class BaseModel(LanguageModel):
    """A causal language model from a Hugging Face folder, ready to be adapted.

    Attributes:
        fused: Its forward pass in larger steps; None where transformers' modules are needed.
    """

    def __init__(self, info: BaseModelInfo, dtype: torch.dtype, device: torch.device) -> None:
        """Load it.

        Raises:
            ModelFolderError: Its architecture does something that this engine does not know.
        """
        module: Any = AutoModelForCausalLM.from_pretrained(
            info.folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa"
        )
        super().__init__(info, module, device)
        expected = self._own_logits()
        module.config._attn_implementation = attention.NAME
        self._make_adaptable()
        is_fused = device.type == "cpu" and is_known(module)
        self._joined = Layers(module) if is_fused else None
        self.fused = FusedModel(self._joined) if self._joined else None
        self._check_logits(expected)

    def laid_out(
        self, tokens: Tokens, images: Sequence[Image], place: str
    ) -> tuple[Tokens, Sequence[Image]]:
        """See `LanguageModel.laid_out`: there is nothing to lay out."""
        if images:
            raise NotServedError(
                f"{place} holds an image; models like {self.info.name} read text only and have no "
                "encoder for anything else.",
                "Send encoded text, or use a vision model (tinker-local/tiny-vl, a Qwen3-VL).",
            )
        return tokens, ()

    @torch.inference_mode()
    def _own_logits(self) -> torch.Tensor:
        """Logits of the probe's tokens, (T, vocabulary), as transformers computes them."""
        logits: torch.Tensor = self._causal_lm(input_ids=self._probe.unsqueeze(0)).logits[0]
        return logits.float()

    @property
    def _probe(self) -> torch.Tensor:
        ids = self._tokenizer(_PROBE, add_special_tokens=False).input_ids[:16]
        return torch.tensor(ids, device=self.device)

    @torch.inference_mode()
    def _check_logits(self, expected: torch.Tensor) -> None:
        """Refuse a model whose logits we do not reproduce: capped, scaled, windowed ..."""
        layout = PackedSequences(0, [len(self._probe)], self.device)
        try:
            logits = self.logits(self.hidden_states(self._probe, layout))
        except NotServedError as error:
            raise ModelFolderError(
                f"{self.info.name} cannot be served: {error.problem}", error.next_step
            ) from error
        difference = float((logits - expected).norm() / expected.norm())
        if not difference < _LOGITS_MAY_DIFFER[self.head.weight.dtype]:
            raise ModelFolderError(
                f"{self.info.name} ({type(self._causal_lm).__name__}) computes its logits in a "
                f"way that tinker-local does not know (relative difference {difference:.2g}).",
                "Serve a model of the Llama, Qwen or SmolLM kind.",
            )

    @cached_property
    def decoder(self) -> Decoder | None:
        """A faster forward pass without gradients; None where this model has none."""
        if self._joined is None or not can_decode():
            return None
        return Decoder(self._joined, self.head, self.layers)

    def hidden_states(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Last hidden states (T, H) of a row of token ids (T,) laid out by `layout`."""
        if self.fused is not None:
            return self.fused.hidden_states(tokens, layout)
        output = self._causal_lm.get_decoder()(
            input_ids=tokens.unsqueeze(0),
            position_ids=layout.positions.unsqueeze(0),
            use_cache=False,
            layout=layout,
        )
        return cast("torch.Tensor", output.last_hidden_state[0])


def context_length(folder: Path) -> int:
    """Positions a model was made for, from its config.json."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return int(config.get_text_config().max_position_embeddings)
