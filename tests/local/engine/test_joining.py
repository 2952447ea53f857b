"""Requests that are sampled together: those that join late, leave early, wait or fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_data import random_adapter

from tinker_local.engine import TorchEngine, sampler
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.sampler import Sampler
from tinker_local.errors import UserInputError
from tinker_local.ops import BaseWeights, Sample, SampledSequence, SampleOutput, SavedWeights
from tiny_data import TINY, tokens_of

Create = Callable[..., str]

# ticket: (joins before this step, text, max_tokens)
REQUESTS: Mapping[str, tuple[int, str, int]] = {
    "first, and long": (0, "the cat sat", 40),
    "first, and done at once": (0, "a dog", 1),
    "with another's prompt": (2, "the cat sat", 9),
    "late, with a long prompt": (5, "it is a long way from here to there, said the cat " * 4, 25),
    "last": (20, "x", 12),
}


def _op(text: str, max_tokens: int, **options: Any) -> Sample:
    prompt = np.array(tokens_of(text), dtype=np.int64)
    return Sample(BaseWeights(TINY), prompt, max_tokens=max_tokens, stop_tokens=[], **options)


@pytest.fixture
def drawing(base_model: BaseModel) -> Sampler:
    adapter = random_adapter(base_model, rank=8, deviation=0.15, seed=0)
    return Sampler(base_model, adapter)


def _finish(drawing: Sampler) -> dict[str, SampleOutput]:
    results: dict[str, SampleOutput] = {}
    for _ in range(1000):
        if drawing.is_idle:
            return results
        results |= drawing.step()
    raise AssertionError(f"{drawing.tickets} are still not done")


def _alone(drawing: Sampler, op: Sample) -> list[SampledSequence]:
    drawing.start("alone", op)
    return list(_finish(drawing)["alone"].sequences)


def _assert_same(one: SampledSequence, other: SampledSequence) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}])
def test_requests_that_join_late_and_leave_early_draw_what_each_draws_alone(
    drawing: Sampler, options: dict[str, Any]
) -> None:
    ops = {name: _op(text, most, **options) for name, (_, text, most) in REQUESTS.items()}
    alone = {name: _alone(drawing, op)[0] for name, op in ops.items()}

    together: dict[str, SampleOutput] = {}
    for step in range(21):
        for name, (joins, _, _) in REQUESTS.items():
            if joins == step:
                drawing.start(name, ops[name])
        together |= drawing.step()
    together |= _finish(drawing)

    assert together.keys() == REQUESTS.keys()
    for name, output in together.items():
        assert len(output.sequences[0].tokens) == REQUESTS[name][2]
        _assert_same(output.sequences[0], alone[name])


def test_a_request_is_done_with_the_step_that_draws_its_last_token(drawing: Sampler) -> None:
    drawing.start("two", _op("a", 2))
    drawing.start("three", _op("b", 3))

    done = [set(drawing.step()) for _ in range(3)]

    # The step that reads a prompt draws the first token, and the next one as well.
    assert [name for names in done for name in sorted(names)] == ["two", "three"]
    assert drawing.is_idle


def test_a_stopped_request_leaves_the_others_as_they_are(drawing: Sampler) -> None:
    ops = {name: _op(name, 20, temperature=0.0) for name in ("one", "two", "three")}
    alone = {name: _alone(drawing, op)[0] for name, op in ops.items()}
    for name, op in ops.items():
        drawing.start(name, op)
    drawing.step()

    drawing.stop("one")

    assert drawing.tickets == ["two", "three"]
    results = _finish(drawing)
    assert results.keys() == {"two", "three"}
    for name, output in results.items():
        _assert_same(output.sequences[0], alone[name])


def test_a_stopped_request_frees_its_rows(drawing: Sampler) -> None:
    drawing.start("many", _op("a cat", 50, num_samples=5))
    drawing.start("one", _op("a dog", 50))
    drawing.step()
    assert len(drawing._cache.lengths) == 6

    drawing.stop("many")

    assert len(drawing._cache.lengths) == 1
    assert list(_finish(drawing)) == ["one"]


def test_stopping_what_is_unknown_or_has_not_begun_changes_nothing(drawing: Sampler) -> None:
    drawing.start("waiting", _op("a", 3))

    drawing.stop("unknown")
    drawing.stop("waiting")

    assert drawing.is_idle
    assert drawing.step() == {}


def test_sequences_that_do_not_fit_the_cache_wait_and_all_finish(
    drawing: Sampler, base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = _op("the cat sat", 9, num_samples=7, seed=5)  # 20 tokens each when done
    other = _op("a dog", 4, num_samples=2, seed=6)
    alone = {"seven": _alone(drawing, op), "two": _alone(drawing, other)}
    monkeypatch.setattr(sampler, "_CACHE_BYTES", 3 * 20 * base_model.cache_bytes_per_token)
    drawing.start("seven", op)
    drawing.start("two", other)

    most = 0
    results: dict[str, SampleOutput] = {}
    while not drawing.is_idle:
        results |= drawing.step()
        most = max(most, len(drawing._rows))

    assert most == 3
    for ticket, sequences in alone.items():
        for one, other_one in zip(results[ticket].sequences, sequences, strict=True):
            _assert_same(one, other_one)


def test_one_sequence_may_begin_however_little_the_cache_holds(
    drawing: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "_CACHE_BYTES", 0)
    drawing.start("two", _op("a", 3, num_samples=2))

    assert [len(s.tokens) for s in _finish(drawing)["two"].sequences] == [3, 3]


def test_the_cache_takes_what_it_is_said_to_take_for_each_token(base_model: BaseModel) -> None:
    # 2 layers, keys and values, 2 key-value heads of 16 numbers, 4 bytes each
    assert base_model.cache_bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_tokens_that_several_prompts_begin_with_are_counted_as_cached(drawing: Sampler) -> None:
    question = "Which animal sat on the mat? "  # 29 tokens
    drawing.start("one", _op(question + "the cat", 1))
    drawing.start("other", _op(question + "a dog", 1))
    drawing.start("alone", _op("something else altogether", 1))

    cached = {ticket: output.cached_tokens for ticket, output in _finish(drawing).items()}

    assert cached["alone"] == 0
    assert sorted([cached["one"], cached["other"]]) == [0, len(question)]


@pytest.fixture
def saved(engine: TorchEngine, create: Create, tmp_path: Path) -> dict[str, SavedWeights]:
    """Sampler weights of two adapters, "good" and "diverged"."""
    found = {}
    for name in ("good", "diverged"):
        model_id = create(seed=1)
        if name == "diverged":
            with torch.no_grad():
                engine._trained[model_id].adapter.factors["lm_head"].b.fill_(torch.nan)
        folder = tmp_path / name
        folder.mkdir()
        engine.save_sampler(model_id, folder)
        found[name] = SavedWeights(TINY, folder)
    return found


def test_a_step_that_fails_fails_that_adapters_requests_and_no_others(
    engine: TorchEngine, saved: dict[str, SavedWeights]
) -> None:
    weights = {
        "bad 1": saved["diverged"],
        "bad 2": saved["diverged"],
        "good": saved["good"],
        "base": BaseWeights(TINY),
    }
    for ticket, source in weights.items():
        engine.start_sample(
            ticket, Sample(source, np.array(tokens_of("a cat")), max_tokens=3, stop_tokens=[])
        )

    results: dict[str, SampleOutput | Exception] = {}
    for _ in range(10):
        results |= engine.continue_samples()

    assert results.keys() == weights.keys()
    for ticket in ("bad 1", "bad 2"):
        assert isinstance(results[ticket], UserInputError)
        assert "weights have diverged" in str(results[ticket])
    for ticket in ("good", "base"):
        output = results[ticket]
        assert isinstance(output, SampleOutput)
        assert len(output.sequences[0].tokens) == 3


def test_a_request_stopped_in_the_engine_never_comes_back(engine: TorchEngine) -> None:
    for ticket in ("stopped", "kept"):
        engine.start_sample(ticket, _op("a cat", 5))
    engine.continue_samples()

    engine.stop_sample("stopped")
    engine.stop_sample("never seen")

    results: dict[str, SampleOutput | Exception] = {}
    for _ in range(10):
        results |= engine.continue_samples()
    assert results.keys() == {"kept"}
    assert engine.continue_samples() == {}
