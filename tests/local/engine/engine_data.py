"""Adapters with something in them, and what transformers computes by itself to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.func import functional_call

from tinker_local.engine import lora
from tinker_local.engine.base_model import BaseModel
from tinker_local.ops import LoraSpec

SOME = {
    "all": ("self_attn", "mlp", "lm_head"),
    "attention alone": ("self_attn",),
    "mlp alone": ("mlp",),
    "unembedding alone": ("lm_head",),
    "queries and values": ("q_proj", "v_proj"),
    "up alone": ("up_proj",),
}
"""Parts of a model that an adapter may touch."""


def only(adapter: lora.Adapter, parts: tuple[str, ...]) -> lora.Adapter:
    """Those of an adapter's factors whose path has one of the parts."""
    factors = {
        path: factors
        for path, factors in adapter.factors.items()
        if any(part in path.split(".") for part in parts)
    }
    assert factors
    return replace(adapter, factors=factors)


def random_adapter(
    model: BaseModel, rank: int = 4, deviation: float = 0.05, seed: int = 1
) -> lora.Adapter:
    """An adapter whose B is drawn from N(0, deviation²), so that it changes something."""
    adapter = lora.new_adapter(model.layers, LoraSpec(rank=rank, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factors in adapter.factors.values():
            factors.b.normal_(0, deviation, generator=generator)
    return adapter


@contextmanager
def by_modules(model: BaseModel) -> Iterator[None]:
    """Have a model's forward passes computed by transformers' modules with `LoraLinear`."""
    fused, model.fused = model.fused, None
    assert fused is not None
    try:
        yield
    finally:
        model.fused = fused


def plain_model(folder: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The same model as transformers loads it, with transformers' own sdpa attention."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    return loaded.requires_grad_(False).eval()


def plain_logits(plain: Any, adapter: lora.Adapter | None, tokens: Sequence[int]) -> torch.Tensor:
    """Logits (T, vocabulary) of one sequence alone, with W + alpha / rank * B A for each W."""
    weights = {
        f"{path}.weight": plain.get_submodule(path).weight
        + (adapter.scale * factors.b @ factors.a).to(plain.dtype)
        for path, factors in (adapter.factors.items() if adapter else ())
    }
    output = functional_call(
        plain,
        weights,
        kwargs={"input_ids": torch.tensor([list(tokens)]), "use_cache": False},
        tie_weights=False,
    )
    return output.logits[0].float()  # type: ignore[no-any-return]


def plain_logprobs(plain: Any, adapter: lora.Adapter | None, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of tokens 1 to N-1, (N-1,), in the sequence alone."""
    scores = plain_logits(plain, adapter, tokens[:-1]).log_softmax(-1)
    return scores.gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)).squeeze(-1)
