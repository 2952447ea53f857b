from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from engine_data import random_adapter

from tinker_local.engine import growing, lora, sample_checks, sampler
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.packed import PackedSequences
from tinker_local.errors import UserInputError
from tinker_local.ops import BaseWeights, Sample, SampledSequence, SampleOutput
from tiny_data import END, TINY, tokens_of

PROMPT = tokens_of("the cat")


@dataclass(frozen=True)
class Adapted:
    """A base model and the adapter it is sampled with."""

    base: BaseModel
    adapter: lora.Adapter


@pytest.fixture
def model(base_model: Adapted) -> Adapted:
    """The tiny model under a large random adapter; by itself it repeats its last token."""
    return Adapted(base_model, random_adapter(base_model, rank=8, deviation=0.15, seed=0))


def _op(**changed: Any) -> Sample:
    prompt = np.array(changed.pop("prompt", PROMPT), dtype=np.int64)
    options: dict[str, Any] = {"max_tokens": 8, "stop_tokens": [], "seed": 1, **changed}
    return Sample(BaseWeights(TINY), prompt, **options)


def _finish(drawing: sampler.Sampler) -> dict[str, SampleOutput]:
    """Step until every request is done."""
    results: dict[str, SampleOutput] = {}
    for _ in range(5000):
        if drawing.is_idle:
            return results
        results |= drawing.step()
    raise AssertionError(f"{drawing.tickets} are still not done")


def _run(model: Adapted, **changed: Any) -> SampleOutput:
    op = _op(**changed)
    sample_checks.check(op, model.base)
    drawing = sampler.Sampler(model.base, model.adapter)
    drawing.start("only", op)
    return _finish(drawing)["only"]


def _one(model: Adapted, **changed: Any) -> SampledSequence:
    [sequence] = _run(model, **changed).sequences
    return sequence


def _logits(model: Adapted, tokens: Sequence[int]) -> torch.Tensor:
    """Logits (T, vocabulary) after each of `tokens`, in one pass without a cache."""
    layout = PackedSequences(0, [len(tokens)], model.base.device)
    with torch.inference_mode(), model.base.adapted(model.adapter):
        hidden = model.base.hidden_states(torch.tensor(list(tokens)), layout)
        return model.base.logits(hidden)


def _logprobs_of(model: Adapted, prompt: Sequence[int], drawn: SampledSequence) -> np.ndarray:
    """What a full forward pass says of a drawn sequence's tokens."""
    logits = _logits(model, [*prompt, *drawn.tokens.tolist()])[len(prompt) - 1 : -1]
    tokens = torch.from_numpy(drawn.tokens)
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].numpy()


def _greedy_without_cache(model: Adapted, tokens: Sequence[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(_logits(model, tokens)[-1].argmax()))
    return tokens[-count:]


def test_greedy_is_the_argmax_of_a_full_forward_at_every_token(model: Adapted) -> None:
    greedy = _one(model, temperature=0)

    assert greedy.tokens.tolist() == _greedy_without_cache(model, PROMPT, 8)


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}])
def test_a_cut_that_leaves_one_token_is_greedy(model: Adapted, cut: dict[str, Any]) -> None:
    assert (
        _one(model, temperature=1.0, **cut).tokens.tolist()
        == _one(model, temperature=0).tokens.tolist()
    )


def test_the_same_seed_draws_the_same_samples(model: Adapted) -> None:
    first, second = (_run(model, num_samples=3, seed=7).sequences for _ in range(2))

    assert [s.tokens.tolist() for s in first] == [s.tokens.tolist() for s in second]


def test_samples_of_one_request_differ(model: Adapted) -> None:
    first, second = _run(model, num_samples=2).sequences

    assert first.tokens.tolist() != second.tokens.tolist()


def test_without_a_seed_two_requests_differ(model: Adapted) -> None:
    first, second = (_one(model, seed=None) for _ in range(2))

    assert first.tokens.tolist() != second.tokens.tolist()


def test_drawing_leaves_the_global_random_state_alone(model: Adapted) -> None:
    before = torch.get_rng_state()

    _one(model)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_are_those_of_the_temperature_scaled_distribution(
    model: Adapted, temperature: float
) -> None:
    drawn = _one(model, temperature=temperature, top_k=5, top_p=0.9)

    tokens = torch.from_numpy(drawn.tokens)
    logits = _logits(model, [*PROMPT, *drawn.tokens.tolist()])[len(PROMPT) - 1 : -1]
    expected = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    np.testing.assert_allclose(drawn.logprobs, expected.numpy(), atol=1e-5)


def test_greedy_logprobs_are_those_at_temperature_one(model: Adapted) -> None:
    drawn = _one(model, temperature=0, max_tokens=1)

    expected = _logits(model, PROMPT)[-1].log_softmax(-1).max()
    assert drawn.logprobs.tolist() == pytest.approx([expected.item()], abs=1e-5)


def _first_tokens(model: Adapted, count: int, **options: Any) -> np.ndarray:
    """How often each id is drawn first, in `count` samples with fixed seeds."""
    drawn = [
        int(sequence.tokens[0])
        for seed in range(count // 128)
        for sequence in _run(model, num_samples=128, max_tokens=1, seed=seed, **options).sequences
    ]
    return np.bincount(drawn, minlength=model.base.vocabulary)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_many_samples_follow_the_softmax(model: Adapted, temperature: float) -> None:
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


def test_a_stop_token_ends_the_sequence_and_is_part_of_it(model: Adapted) -> None:
    free = _one(model, temperature=0).tokens.tolist()
    stop = next(token for place, token in enumerate(free) if place and token not in free[:place])

    stopped = _one(model, temperature=0, stop_tokens=[stop])

    assert stopped.is_stopped
    assert stopped.tokens.tolist() == free[: free.index(stop) + 1]


def test_a_stop_string_ends_the_sequence_with_the_token_that_completes_it(
    model: Adapted,
) -> None:
    free = _one(model, max_tokens=40).tokens.tolist()
    place = next(i for i in range(1, 40) if 31 < min(free[i : i + 2]) <= max(free[i : i + 2]) < 127)
    pair = bytes(free[place : place + 2])

    stopped = _one(model, max_tokens=40, stop_strings=[pair.decode()])

    assert stopped.is_stopped
    assert stopped.tokens.tolist() == free[: bytes_of(free).index(pair) + 2]


def test_a_stop_string_whose_character_has_several_tokens_is_found(model: Adapted) -> None:
    tokens = [*b"ab", *"€".encode()]

    ends = [growing.ends(_op(stop_strings=["b€"]), model.base, tokens[:n]) for n in range(1, 6)]

    assert ends == [False, False, False, False, True]


def bytes_of(tokens: list[int]) -> bytes:
    """The text of tokens; a special one, which no stop string here holds, as a zero byte."""
    return bytes(token if token < 256 else 0 for token in tokens)


@pytest.fixture
def ended(model: Adapted, monkeypatch: pytest.MonkeyPatch) -> Adapted:
    """The model, but every next token is the end of text."""

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(len(hidden), model.base.vocabulary)
        scores[:, END] = 100.0
        return scores

    monkeypatch.setattr(model.base, "logits", logits)
    monkeypatch.setattr(model.base, "decoder", None)
    return model


def test_the_models_own_end_of_text_stops_by_default(ended: Adapted) -> None:
    assert _one(ended, stop_tokens=None).tokens.tolist() == [END]


def test_an_empty_stop_list_ignores_the_end_of_text(ended: Adapted) -> None:
    drawn = _one(ended, stop_tokens=[])

    assert (drawn.tokens.tolist(), drawn.is_stopped) == ([END] * 8, False)


def test_max_tokens_ends_a_sequence_unstopped(model: Adapted) -> None:
    drawn = _one(model, max_tokens=3)

    assert (len(drawn.tokens), len(drawn.logprobs), drawn.is_stopped) == (3, 3, False)


@pytest.fixture
def small_context(model: Adapted, monkeypatch: pytest.MonkeyPatch) -> Adapted:
    """The model with room for 10 tokens."""
    info = dataclasses.replace(model.base.info, max_context_length=10)
    monkeypatch.setattr(model.base, "info", info)
    return model


@pytest.mark.parametrize("max_tokens", [None, 50])
def test_a_sequence_ends_with_the_context(small_context: Adapted, max_tokens: int | None) -> None:
    drawn = _one(small_context, max_tokens=max_tokens)

    assert len(PROMPT) + len(drawn.tokens) == 10


def test_a_prompt_that_fills_the_context_is_refused(small_context: Adapted) -> None:
    with pytest.raises(UserInputError, match="has 10 tokens; tinker-local/tiny takes 1 to 9"):
        _one(small_context, prompt=[97] * 10)


def test_samples_that_end_at_different_times_are_scored_as_if_alone(
    model: Adapted,
) -> None:
    # Were the rows of the survivors mixed up, their scores would belong to another's tokens.
    together = _run(model, num_samples=6, max_tokens=30, stop_tokens=list(range(0, 256, 4)))
    lengths = {len(sequence.tokens) for sequence in together.sequences}

    assert len(lengths) > 2
    for sequence in together.sequences:
        alone = _logprobs_of(model, PROMPT, sequence)
        np.testing.assert_allclose(sequence.logprobs, alone, atol=1e-5)


def test_128_samples_are_drawn_together(model: Adapted) -> None:
    drawn = _run(model, num_samples=128, max_tokens=3).sequences

    assert [len(sequence.tokens) for sequence in drawn] == [3] * 128
    assert len({tuple(sequence.tokens) for sequence in drawn}) > 64
    for sequence in drawn[::16]:
        alone = _logprobs_of(model, PROMPT, sequence)
        np.testing.assert_allclose(sequence.logprobs, alone, atol=1e-5)


def test_the_likeliest_tokens_come_beside_each_new_one(model: Adapted) -> None:
    drawn = _one(model, temperature=2.0, top_sampled=3, max_tokens=5)

    logits = _logits(model, [*PROMPT, *drawn.tokens.tolist()])[len(PROMPT) - 1 : -1]
    expected = (logits / 2.0).log_softmax(-1).topk(3)
    assert drawn.top is not None
    assert drawn.top.tokens.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(drawn.top.logprobs, expected.values.numpy(), atol=1e-5)


def test_requests_with_and_without_the_likeliest_tokens_share_steps(model: Adapted) -> None:
    drawing = sampler.Sampler(model.base, model.adapter)
    for count in (0, 1, 4):
        drawing.start(str(count), _op(top_sampled=count, max_tokens=3))

    results = _finish(drawing)

    tops = [results[ticket].sequences[0].top for ticket in ("0", "1", "4")]
    assert tops[0] is None
    assert [top.tokens.shape for top in tops[1:] if top is not None] == [(3, 1), (3, 4)]


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
        ({"top_sampled": 260}, "topk_sample_logprobs is 260.*Use 0 to 259"),
        ({"top_prompt": -1}, "topk_prompt_logprobs is -1"),
        ({"prompt_alternatives": 260}, "prompt_alt_tokens_k is 260"),
        ({"prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n is 2.*Ask for prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 7}, "last_n is 7, the prompt has 7"),
        ({"prompt_targets": np.zeros((7, 1), int)}, r"the shape \[7, 1\].*\[6, K\]"),
        ({"prompt_targets": np.full((6, 1), 259)}, "target_prompt_logprobs holds token id 259"),
        ({"stop_strings": ["x", ""]}, r"stop strings \['x', ''\]"),
    ],
)
def test_an_argument_out_of_range_is_named(
    model: Adapted, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserInputError, match=said):
        _one(model, **changed)
