"""A base model in memory: frozen weights, wrapped once for adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tinker_local.engine.lora import LoraLinear, wrap
from tinker_local.ops import BaseModelInfo


class BaseModel:
    """A causal language model from a Hugging Face folder, ready to be adapted.

    Attributes:
        layers: The adaptable layers by dotted path; see `lora.active`.
    """

    def __init__(self, info: BaseModelInfo, dtype: torch.dtype, device: torch.device) -> None:
        self.info = info
        self.device = device
        module: Any = AutoModelForCausalLM.from_pretrained(
            info.folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa"
        )
        self._causal_lm: Any = module.requires_grad_(False).eval().to(device)
        self.layers: Mapping[str, LoraLinear] = wrap(cast("nn.Module", module))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(info.folder, local_files_only=True)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._causal_lm.config.vocab_size)

    @property
    def end_of_text(self) -> tuple[int, ...]:
        """The ids that end a sequence unless a request says otherwise."""
        ids = self._causal_lm.generation_config.eos_token_id
        if ids is None:
            ids = self._tokenizer.eos_token_id
        return (ids,) if isinstance(ids, int) else tuple(ids or ())

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states (B, T, H) of token ids (B, T); padding on the right is harmless."""
        output = self._causal_lm.get_decoder()(input_ids=tokens, use_cache=False)
        return cast("torch.Tensor", output.last_hidden_state)

    def extend(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Hidden states (B, T, H) of tokens (B, T) that follow those in `cache`, which grows."""
        output = self._causal_lm.get_decoder()(
            input_ids=tokens, past_key_values=cache, use_cache=True
        )
        return cast("torch.Tensor", output.last_hidden_state)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores (..., vocabulary) of the next token, float32, from hidden states (..., H)."""
        scores: torch.Tensor = self._causal_lm.get_output_embeddings()(hidden)
        return scores.float()

    def text(self, tokens: list[int]) -> str:
        """The text of some token ids, special tokens included."""
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def context_length(folder: Path) -> int:
    """Positions a model was made for, from its config.json."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return int(config.max_position_embeddings)
