from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tinker_local.engine import lora, sampler
from tinker_local.engine.base_model import BaseModel
from tinker_local.errors import CancelledError, UserInputError
from tinker_local.ops import BaseWeights, LoraSpec, Sample, SampledSequence, SampleOutput
from tiny_data import END, TINY, tokens_of

PROMPT = tokens_of("the cat")


@pytest.fixture
def model(base_model: BaseModel) -> Iterator[BaseModel]:
    """The tiny model under a large random adapter; by itself it repeats its last token."""
    adapter = lora.new_adapter(base_model.layers, LoraSpec(rank=8, seed=0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factors in adapter.factors.values():
            factors.b.normal_(0, 0.15, generator=generator)
    with lora.active(base_model.layers, adapter):
        yield base_model


def _op(**changed: Any) -> Sample:
    prompt = np.array(changed.pop("prompt", PROMPT), dtype=np.int64)
    options: dict[str, Any] = {"max_tokens": 8, "stop_tokens": [], "seed": 1, **changed}
    return Sample(BaseWeights(TINY), prompt, **options)


def _run(model: BaseModel, **changed: Any) -> SampleOutput:
    op = _op(**changed)
    sampler.check(op, model)
    return sampler.run(op, model, lambda: False)


def _one(model: BaseModel, **changed: Any) -> SampledSequence:
    [sequence] = _run(model, **changed).sequences
    return sequence


def _logits(model: BaseModel, tokens: Sequence[int]) -> torch.Tensor:
    """Logits (T, vocabulary) after each of `tokens`, in one pass without a cache."""
    with torch.inference_mode():
        return model.logits(model.hidden_states(torch.tensor([list(tokens)])))[0]


def _greedy_without_cache(model: BaseModel, tokens: Sequence[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(_logits(model, tokens)[-1].argmax()))
    return tokens[-count:]


def test_greedy_is_the_argmax_of_a_full_forward_at_every_token(model: BaseModel) -> None:
    greedy = _one(model, temperature=0)

    assert greedy.tokens.tolist() == _greedy_without_cache(model, PROMPT, 8)


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}])
def test_a_cut_that_leaves_one_token_is_greedy(model: BaseModel, cut: dict[str, Any]) -> None:
    assert (
        _one(model, temperature=1.0, **cut).tokens.tolist()
        == _one(model, temperature=0).tokens.tolist()
    )


def test_the_same_seed_draws_the_same_samples(model: BaseModel) -> None:
    first, second = (_run(model, num_samples=3, seed=7).sequences for _ in range(2))

    assert [s.tokens.tolist() for s in first] == [s.tokens.tolist() for s in second]


def test_samples_of_one_request_differ(model: BaseModel) -> None:
    first, second = _run(model, num_samples=2).sequences

    assert first.tokens.tolist() != second.tokens.tolist()


def test_without_a_seed_two_requests_differ(model: BaseModel) -> None:
    first, second = (_one(model, seed=None) for _ in range(2))

    assert first.tokens.tolist() != second.tokens.tolist()


def test_drawing_leaves_the_global_random_state_alone(model: BaseModel) -> None:
    before = torch.get_rng_state()

    _one(model)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_are_those_of_the_temperature_scaled_distribution(
    model: BaseModel, temperature: float
) -> None:
    drawn = _one(model, temperature=temperature, top_k=5, top_p=0.9)

    tokens = torch.from_numpy(drawn.tokens)
    logits = _logits(model, [*PROMPT, *drawn.tokens.tolist()])[len(PROMPT) - 1 : -1]
    expected = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    np.testing.assert_allclose(drawn.logprobs, expected.numpy(), atol=1e-5)


def test_greedy_logprobs_are_those_at_temperature_one(model: BaseModel) -> None:
    drawn = _one(model, temperature=0, max_tokens=1)

    expected = _logits(model, PROMPT)[-1].log_softmax(-1).max()
    assert drawn.logprobs.tolist() == pytest.approx([expected.item()], abs=1e-5)


def _first_tokens(model: BaseModel, count: int, **options: Any) -> np.ndarray:
    """How often each id is drawn first, in `count` samples with fixed seeds."""
    drawn = [
        int(sequence.tokens[0])
        for seed in range(count // 128)
        for sequence in _run(model, num_samples=128, max_tokens=1, seed=seed, **options).sequences
    ]
    return np.bincount(drawn, minlength=model.vocabulary)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_many_samples_follow_the_softmax(model: BaseModel, temperature: float) -> None:
    count = 128 * 20
    observed = _first_tokens(model, count, temperature=temperature)
    scaled = _logits(model, PROMPT)[-1] / temperature
    expected = scaled.softmax(-1).numpy() * count
    common = expected >= 5  # chi-square needs so many; the others are counted together
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    chi_square = float(((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum())
    freedom = len(expected) - 1  # the mean of chi-square; its deviation is sqrt(2 * freedom)
    assert freedom > 10
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_top_p_keeps_the_smallest_set_that_has_the_mass() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])

    kept = sampler._truncate(probabilities, top_k=-1, top_p=0.7)

    assert kept.tolist() == [pytest.approx([0.0, 0.5, 0.0, 0.25])]


def test_top_k_keeps_the_likeliest() -> None:
    kept = sampler._truncate(torch.tensor([[0.1, 0.5, 0.15, 0.25]]), top_k=3, top_p=1.0)

    assert kept.tolist() == [pytest.approx([0.0, 0.5, 0.15, 0.25])]


def test_a_stop_token_ends_the_sequence_and_is_part_of_it(model: BaseModel) -> None:
    free = _one(model, temperature=0).tokens.tolist()
    stop = next(token for place, token in enumerate(free) if place and token not in free[:place])

    stopped = _one(model, temperature=0, stop_tokens=[stop])

    assert stopped.is_stopped
    assert stopped.tokens.tolist() == free[: free.index(stop) + 1]


def test_a_stop_string_ends_the_sequence_with_the_token_that_completes_it(
    model: BaseModel,
) -> None:
    free = _one(model, max_tokens=40).tokens.tolist()
    place = next(i for i in range(1, 40) if 31 < min(free[i : i + 2]) <= max(free[i : i + 2]) < 127)
    pair = bytes(free[place : place + 2])

    stopped = _one(model, max_tokens=40, stop_strings=[pair.decode()])

    assert stopped.is_stopped
    assert stopped.tokens.tolist() == free[: bytes_of(free).index(pair) + 2]


def test_a_stop_string_whose_character_has_several_tokens_is_found(model: BaseModel) -> None:
    tokens = [*b"ab", *"€".encode()]

    ends = [sampler._ends(_op(stop_strings=["b€"]), model, tokens[:n]) for n in range(1, 6)]

    assert ends == [False, False, False, False, True]


def bytes_of(tokens: list[int]) -> bytes:
    """The text of tokens; a special one, which no stop string here holds, as a zero byte."""
    return bytes(token if token < 256 else 0 for token in tokens)


class _AlwaysEnds:
    """The base model, but every next token is the end of text."""

    def __init__(self, model: BaseModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self._model.logits(hidden)
        scores[..., END] = 100.0
        return scores


def test_the_models_own_end_of_text_stops_by_default(model: BaseModel) -> None:
    ended: Any = _AlwaysEnds(model)

    assert _one(ended, stop_tokens=None).tokens.tolist() == [END]


def test_an_empty_stop_list_ignores_the_end_of_text(model: BaseModel) -> None:
    ended: Any = _AlwaysEnds(model)

    drawn = _one(ended, stop_tokens=[])

    assert (drawn.tokens.tolist(), drawn.is_stopped) == ([END] * 8, False)


def test_max_tokens_ends_a_sequence_unstopped(model: BaseModel) -> None:
    drawn = _one(model, max_tokens=3)

    assert (len(drawn.tokens), len(drawn.logprobs), drawn.is_stopped) == (3, 3, False)


@pytest.fixture
def small_context(model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """The base model with room for 10 tokens."""
    info = dataclasses.replace(model.info, max_context_length=10)
    monkeypatch.setattr(model, "info", info)
    return model


@pytest.mark.parametrize("max_tokens", [None, 50])
def test_a_sequence_ends_with_the_context(small_context: BaseModel, max_tokens: int | None) -> None:
    drawn = _one(small_context, max_tokens=max_tokens)

    assert len(PROMPT) + len(drawn.tokens) == 10


def test_a_prompt_that_fills_the_context_is_refused(small_context: BaseModel) -> None:
    with pytest.raises(UserInputError, match="has 10 tokens; tinker-local/tiny takes 1 to 9"):
        _one(small_context, prompt=[97] * 10)


def test_samples_that_end_at_different_times_are_scored_as_if_alone(
    model: BaseModel,
) -> None:
    # Were the rows of the survivors mixed up, their scores would belong to another's tokens.
    together = _run(model, num_samples=6, max_tokens=30, stop_tokens=list(range(0, 256, 4)))
    lengths = {len(sequence.tokens) for sequence in together.sequences}

    assert len(lengths) > 2
    for sequence in together.sequences:
        tokens = torch.from_numpy(sequence.tokens)
        logits = _logits(model, [*PROMPT, *sequence.tokens.tolist()])[len(PROMPT) - 1 : -1]
        alone = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        np.testing.assert_allclose(sequence.logprobs, alone.numpy(), atol=1e-5)


def test_a_cancelled_sample_stops_before_its_next_token(model: BaseModel) -> None:
    asked = itertools.count()

    with pytest.raises(CancelledError):
        sampler.run(_op(max_tokens=1000), model, lambda: next(asked) == 3)

    assert next(asked) == 4


def test_prompt_logprobs_equal_a_full_forward(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "_SCORED_AT_ONCE", 2)

    scored = _run(model, temperature=3.0, prompt_logprobs=True).prompt_logprobs

    assert scored is not None
    assert math.isnan(scored[0])
    targets = torch.tensor(PROMPT[1:])
    expected = _logits(model, PROMPT)[:-1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    np.testing.assert_allclose(scored[1:], expected.numpy(), atol=1e-5)


def test_a_prompt_of_one_token_has_one_undefined_logprob(model: BaseModel) -> None:
    scored = _run(model, prompt=[97], prompt_logprobs=True).prompt_logprobs

    assert scored is not None
    assert np.isnan(scored).tolist() == [True]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": []}, "prompt has 0 tokens"),
        ({"prompt": [97, 259]}, r"token ids \[259\]: out of range. Allowed: below 259"),
        ({"num_samples": 0}, "num_samples 0"),
        ({"num_samples": 129}, "num_samples 129: out of range. Allowed: 1 to 128"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"stop_strings": ["x", ""]}, r"stop strings \['x', ''\]"),
    ],
)
def test_an_argument_out_of_range_is_named(
    model: BaseModel, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserInputError, match=said):
        _one(model, **changed)
