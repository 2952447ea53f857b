"""The decoder's logits against those of transformers' modules, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_data import SOME, by_modules, only, random_adapter

from tinker_local.engine import prompts
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.cache import KeyValueCache
from tinker_local.engine.lora import Adapter
from tiny_data import tokens_of


def _both(
    model: BaseModel, adapter: Adapter | None, steps: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (steps, 3, vocabulary) by the decoder and by transformers' modules."""
    assert model.decoder is not None
    decoder = model.decoder.adapted(adapter)
    ours, theirs = [], []
    with torch.inference_mode(), model.adapted(adapter), by_modules(model):
        [prompt] = prompts.read([np.array(tokens_of("the cat"))], model)
        caches = [KeyValueCache(), KeyValueCache()]
        for cache in caches:
            cache.append(prompt.layers, 3)
        for step in range(steps):
            tokens = torch.tensor([40 + step, 50 + step, 60])
            hidden = decoder.hidden_states(tokens, caches[0].next_tokens(model.device))
            ours.append(decoder.logits(hidden))
            hidden = model.hidden_states(tokens, caches[1].next_tokens(model.device))
            theirs.append(model.logits(hidden))
    return torch.stack(ours), torch.stack(theirs)


@pytest.mark.parametrize("parts", SOME.values(), ids=SOME.keys())
@pytest.mark.parametrize("rank", [4, 32, 48])
def test_a_step_gives_the_logits_of_transformers_modules(
    base_model: BaseModel, parts: tuple[str, ...], rank: int
) -> None:
    adapter = only(random_adapter(base_model, rank=rank, deviation=0.2), parts)

    ours, theirs = _both(base_model, adapter)

    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    without, _ = _both(base_model, None)
    assert (ours - without).abs().max() > 1e-3, "the adapter changes nothing"


def test_a_step_of_the_base_model_gives_the_logits_of_transformers_modules(
    base_model: BaseModel,
) -> None:
    ours, theirs = _both(base_model, None)

    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_prompts_are_read_as_by_transformers_modules(base_model: BaseModel) -> None:
    assert base_model.decoder is not None
    adapter = random_adapter(base_model, rank=8, deviation=0.2)
    question = tokens_of("Which animal sat on the mat? ")  # long enough to be read once
    texts = [np.array([*question, *tokens_of(end)]) for end in ("the cat", "a dog, or two")]

    with torch.inference_mode(), base_model.adapted(adapter), by_modules(base_model):
        ours = prompts.read(texts, base_model.decoder.adapted(adapter))
        theirs = prompts.read(texts, base_model)

    for one, other in zip(ours, theirs, strict=True):
        assert one.cached_tokens == other.cached_tokens
        torch.testing.assert_close(one.hidden, other.hidden, atol=2e-5, rtol=1e-5)
        for (k, v), (other_k, other_v) in zip(one.layers, other.layers, strict=True):
            torch.testing.assert_close(k, other_k, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(v, other_v, atol=2e-5, rtol=1e-5)


def test_in_bfloat16_it_is_as_close_as_rounding_allows(half_model: BaseModel) -> None:
    ours, theirs = _both(half_model, random_adapter(half_model, deviation=0.2))

    assert (ours - theirs).norm() / theirs.norm() < 0.02
