"""What is said of a prompt, against a full forward pass of transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from engine_data import plain_logits, random_adapter

from tinker_local.engine import lora, prompts
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.sampler import Sampler
from tinker_local.ops import NOT_SCORED, BaseWeights, Sample, SampleOutput
from tiny_data import TINY, tokens_of

PROMPT = tokens_of("the cat sat")  # 11 tokens
SIZE = len(PROMPT)


@pytest.fixture
def adapter(base_model: BaseModel) -> lora.Adapter:
    return random_adapter(base_model, rank=8, deviation=0.15, seed=0)


@pytest.fixture
def expected(plain: Any, adapter: lora.Adapter) -> torch.Tensor:
    """Log-probabilities at positions 1 to P-1, (P-1, vocabulary)."""
    return plain_logits(plain, adapter, PROMPT)[:-1].log_softmax(-1).detach()


@pytest.fixture(params=[256, 3])
def scored_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions at once, and three at a time."""
    monkeypatch.setattr(prompts, "_SCORED_AT_ONCE", request.param)


def _scores(
    model: BaseModel, adapter: lora.Adapter, prompt: list[int] = PROMPT, **asked: Any
) -> SampleOutput:
    options: dict[str, Any] = {"max_tokens": 1, "seed": 1, **asked}
    drawing = Sampler(model, adapter)
    drawing.start("only", Sample(BaseWeights(TINY), np.array(prompt), **options))
    return drawing.step()["only"]


@pytest.mark.usefixtures("scored_at_once")
def test_prompt_logprobs_equal_a_full_forward_at_any_temperature(
    base_model: BaseModel, adapter: lora.Adapter, expected: torch.Tensor
) -> None:
    scored = _scores(base_model, adapter, temperature=3.0, prompt_logprobs=True).prompt_logprobs

    assert scored is not None
    assert math.isnan(scored[0])
    own = expected.gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    np.testing.assert_allclose(scored[1:], own.numpy(), atol=1e-5)


@pytest.mark.usefixtures("scored_at_once")
@pytest.mark.parametrize("last_n", [1, 4, SIZE - 1])
def test_last_n_scores_only_so_many_of_the_last_tokens(
    base_model: BaseModel, adapter: lora.Adapter, expected: torch.Tensor, last_n: int
) -> None:
    output = _scores(
        base_model, adapter, prompt_logprobs=True, top_prompt=2, prompt_logprobs_last_n=last_n
    )

    scored, top = output.prompt_logprobs, output.prompt_top
    assert scored is not None and top is not None
    assert np.isnan(scored).tolist() == [True] * (SIZE - last_n) + [False] * last_n
    own = expected.gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    np.testing.assert_allclose(scored[-last_n:], own[-last_n:].numpy(), atol=1e-5)
    assert top.tokens[-last_n:].tolist() == expected.topk(2).indices[-last_n:].tolist()
    assert (top.logprobs[:-last_n] == NOT_SCORED).all()
    assert not top.tokens[:-last_n].any()


@pytest.mark.usefixtures("scored_at_once")
def test_the_likeliest_prompt_tokens_come_best_first(
    base_model: BaseModel, adapter: lora.Adapter, expected: torch.Tensor
) -> None:
    output = _scores(base_model, adapter, top_prompt=3)

    top = output.prompt_top
    assert top is not None
    assert output.prompt_logprobs is None
    best = expected.topk(3)
    assert top.tokens.tolist() == [[0, 0, 0], *best.indices.tolist()]
    np.testing.assert_allclose(top.logprobs[1:], best.values.numpy(), atol=1e-5)
    assert top.logprobs[0].tolist() == [NOT_SCORED] * 3


@pytest.mark.usefixtures("scored_at_once")
def test_targets_are_scored_where_they_are_asked(
    base_model: BaseModel, adapter: lora.Adapter, expected: torch.Tensor
) -> None:
    targets = np.array([[place, 258 - place] for place in range(SIZE - 1)])
    targets[2] = [-1, 7]
    targets[5] = [-1, -1]

    scored = _scores(base_model, adapter, prompt_targets=targets).prompt_targets

    assert scored is not None
    wanted = expected.gather(-1, torch.tensor(targets).clamp(min=0)).numpy()
    np.testing.assert_allclose(scored, np.where(targets < 0, 0.0, wanted), atol=1e-5)


def test_targets_are_scored_everywhere_even_if_logprobs_are_only_of_the_last(
    base_model: BaseModel, adapter: lora.Adapter, expected: torch.Tensor
) -> None:
    targets = np.array([[9]] * (SIZE - 1))

    output = _scores(
        base_model, adapter, prompt_targets=targets, prompt_logprobs=True, prompt_logprobs_last_n=1
    )

    assert output.prompt_targets is not None and output.prompt_logprobs is not None
    np.testing.assert_allclose(output.prompt_targets, expected[:, [9]].numpy(), atol=1e-5)
    assert np.isnan(output.prompt_logprobs[:-1]).all()


@pytest.mark.usefixtures("scored_at_once")
def test_alternatives_are_scored_at_temperature_one(
    base_model: BaseModel, adapter: lora.Adapter, expected: torch.Tensor
) -> None:
    drawn = _scores(base_model, adapter, temperature=0.5, prompt_alternatives=4).prompt_alternatives

    assert drawn is not None
    assert drawn.tokens.shape == (SIZE - 1, 4)
    wanted = expected.gather(-1, torch.tensor(drawn.tokens)).numpy()
    np.testing.assert_allclose(drawn.logprobs, wanted, atol=1e-5)


def test_alternatives_are_drawn_at_the_temperature(
    base_model: BaseModel, adapter: lora.Adapter, expected: torch.Tensor
) -> None:
    count = 259  # the most that may be asked
    drawn = _scores(base_model, adapter, temperature=0.5, prompt_alternatives=count)

    assert drawn.prompt_alternatives is not None
    heated = (expected / 0.5).softmax(-1)
    likeliest = heated.max(-1)
    shares = (drawn.prompt_alternatives.tokens == likeliest.indices.numpy()[:, None]).mean(-1)
    # A share's standard deviation is at most sqrt(0.25 / 259) = 0.031.
    np.testing.assert_allclose(shares, likeliest.values.numpy(), atol=0.155)


def test_alternatives_at_temperature_zero_are_the_likeliest_and_with_a_seed_always_the_same(
    base_model: BaseModel, adapter: lora.Adapter, expected: torch.Tensor
) -> None:
    greedy = _scores(base_model, adapter, temperature=0.0, prompt_alternatives=2)
    first, second = (_scores(base_model, adapter, seed=4, prompt_alternatives=3) for _ in range(2))

    assert greedy.prompt_alternatives is not None
    best = expected.argmax(-1).tolist()
    assert greedy.prompt_alternatives.tokens.tolist() == [[token, token] for token in best]
    assert first.prompt_alternatives is not None and second.prompt_alternatives is not None
    assert first.prompt_alternatives.tokens.tolist() == second.prompt_alternatives.tokens.tolist()


def test_a_prompt_of_one_token_has_one_undefined_logprob(
    base_model: BaseModel, adapter: lora.Adapter
) -> None:
    output = _scores(base_model, adapter, [97], prompt_logprobs=True, top_prompt=1)

    assert output.prompt_logprobs is not None and output.prompt_top is not None
    assert np.isnan(output.prompt_logprobs).tolist() == [True]
    assert output.prompt_top.logprobs.tolist() == [[NOT_SCORED]]


def test_what_is_not_asked_is_not_there(base_model: BaseModel, adapter: lora.Adapter) -> None:
    output = _scores(base_model, adapter)

    assert (output.prompt_logprobs, output.prompt_top, output.prompt_targets) == (None, None, None)
    assert output.prompt_alternatives is None


QUESTION = tokens_of("Which animal sat on the mat? ")  # 29 tokens


def test_prompts_that_share_their_beginning_are_read_as_each_alone(
    base_model: BaseModel, adapter: lora.Adapter, plain: Any
) -> None:
    texts = [[*QUESTION, *tokens_of(end)] for end in ("the cat", "a dog, or two", "it")]
    texts.append(tokens_of("something else"))

    with torch.inference_mode(), base_model.adapted(adapter):
        read = prompts.read([np.array(tokens) for tokens in texts], base_model)
        logits = [base_model.logits(prompt.hidden) for prompt in read]

    assert sorted(prompt.cached_tokens for prompt in read) == [0, 0, 29, 29]
    for tokens, prompt, ours in zip(texts, read, logits, strict=True):
        theirs = plain_logits(plain, adapter, tokens).detach()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert [k.shape for k, _ in prompt.layers] == [(2, len(tokens), 16)] * 2


def test_prompts_read_together_are_scored_each_by_itself(
    base_model: BaseModel, adapter: lora.Adapter, plain: Any
) -> None:
    texts = {end: [*QUESTION, *tokens_of(end)] for end in ("the cat", "a dog, or two")}
    drawing = Sampler(base_model, adapter)
    for end, tokens in texts.items():
        drawing.start(
            end, Sample(BaseWeights(TINY), np.array(tokens), max_tokens=1, prompt_logprobs=True)
        )

    results = drawing.step()

    for end, tokens in texts.items():
        scored = results[end].prompt_logprobs
        assert scored is not None
        own = plain_logits(plain, adapter, tokens)[:-1].log_softmax(-1)
        theirs = own.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].detach()
        np.testing.assert_allclose(scored[1:], theirs.numpy(), atol=1e-5)
