"""The sampler says of its tokens what the training forward says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tinker_local.engine import TorchEngine
from tinker_local.ops import (
    ForwardBackward,
    LoraSpec,
    Sample,
    SampledSequence,
    SavedWeights,
    Tokens,
    TrainingDatum,
)
from tinker_local.weights import DEFAULT_MODEL, cache_dir, quiet_progress, resolve_model
from tiny_data import TINY, run_slices, sample, tokens_of

PROMPT = np.array(tokens_of("the cat sat on the mat"), dtype=np.int64)


def _fill(engine: TorchEngine, model_id: str, deviation: float) -> None:
    """Draw every B from N(0, deviation²)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factors in engine._trained[model_id].adapter.factors.values():
            factors.b.normal_(0, deviation, generator=generator)


def _forward(
    engine: TorchEngine, model_id: str, prompt: Tokens, drawn: list[SampledSequence]
) -> list[np.ndarray]:
    """Log-probabilities of the drawn tokens in one training forward over all of them."""
    data = []
    for sequence in drawn:
        tokens = np.concatenate([prompt, sequence.tokens])
        weights = np.ones(len(tokens) - 1, np.float32)
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        data.append(TrainingDatum(tokens[:-1], inputs))
    op = ForwardBackward(model_id, data, "cross_entropy")  # with its gradient: as in training
    logprobs = run_slices(engine.forward_backward(op)).logprobs
    return [scores[len(prompt) - 1 :] for scores in logprobs]


def _divergence(sampled: list[np.ndarray], forward: list[np.ndarray]) -> float:
    """Mean KL(sampler || forward), by the estimator exp(d) - 1 - d of d = forward - sampler."""
    d = np.concatenate(forward) - np.concatenate(sampled)
    return float(np.mean(np.expm1(d) - d))


def test_in_float32_logprobs_differ_by_less_than_1e_4(engine: TorchEngine, tmp_path: Path) -> None:
    engine.create_model("faithful", TINY, LoraSpec(rank=8, seed=0))
    _fill(engine, "faithful", 0.15)
    engine.save_sampler("faithful", tmp_path)
    op = Sample(SavedWeights(TINY, tmp_path), PROMPT, 8, max_tokens=60, stop_tokens=[], seed=1)

    drawn = list(sample(engine, op).sequences)

    forward = _forward(engine, "faithful", PROMPT, drawn)
    engine.drop_model("faithful")
    for sequence, scores in zip(drawn, forward, strict=True):
        np.testing.assert_allclose(sequence.logprobs, scores, atol=1e-4)


@pytest.mark.parametrize("name", [TINY, DEFAULT_MODEL])
def test_in_bfloat16_the_mean_divergence_is_below_0_005(name: str, tmp_path: Path) -> None:
    files = resolve_model(name, cache_dir(), progress=quiet_progress)
    engine = TorchEngine({name: files.folder}, "bfloat16")
    engine.create_model("half", name, LoraSpec(rank=8, seed=0))
    _fill(engine, "half", 0.15 if name == TINY else 0.01)
    engine.save_sampler("half", tmp_path)
    op = Sample(SavedWeights(name, tmp_path), PROMPT, 12, max_tokens=25, stop_tokens=[], seed=1)

    drawn = list(sample(engine, op).sequences)

    sampled = [sequence.logprobs for sequence in drawn]
    forward = _forward(engine, "half", PROMPT, drawn)
    assert sum(len(scores) for scores in forward) == 300
    assert 0 < _divergence(sampled, forward) < 0.005
