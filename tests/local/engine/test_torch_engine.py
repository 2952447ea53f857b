from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tinker_local.engine import TorchEngine
from tinker_local.errors import NotFoundError
from tinker_local.ops import (
    AdamParams,
    BaseWeights,
    Sample,
    SampleOutput,
    SamplerWeights,
    SavedWeights,
)
from tiny_data import TINY, cross_entropy_op, run_slices, sample, tokens_of

Create = Callable[..., str]

FAST = AdamParams(learning_rate=1e-2)
TEXT = "the cat sat on the mat"


def _train(engine: TorchEngine, model_id: str, steps: int, text: str = TEXT) -> list[float]:
    """The loss before each of so many steps."""
    losses = []
    for _ in range(steps):
        output = run_slices(engine.forward_backward(cross_entropy_op(model_id, text)))
        losses.append(output.metrics["loss:sum"])
        engine.optim_step(model_id, FAST)
    return losses


def _forward(engine: TorchEngine, model_id: str, text: str = TEXT) -> np.ndarray:
    op = cross_entropy_op(model_id, text, forward_only=True)
    return np.array(run_slices(engine.forward_backward(op)).logprobs[0])


def _sample(engine: TorchEngine, weights: SamplerWeights, text: str = TEXT) -> SampleOutput:
    prompt = np.array(tokens_of(text))
    op = Sample(weights, prompt, max_tokens=8, stop_tokens=[], seed=1, prompt_logprobs=True)
    return sample(engine, op)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_training_lowers_the_loss(engine: TorchEngine, create: Create) -> None:
    losses = _train(engine, create(), steps=10)

    assert losses[-1] < losses[0] / 2


def test_training_one_adapter_does_not_disturb_another(engine: TorchEngine, create: Create) -> None:
    alone = _train(engine, create(seed=3), steps=4)
    first, second = create(seed=3), create(seed=4)

    losses = []
    for _ in range(4):
        losses += _train(engine, first, steps=1)
        _train(engine, second, steps=1, text="something else")

    assert losses == alone


def test_base_samples_do_not_see_a_trained_adapter(engine: TorchEngine, create: Create) -> None:
    before = _sample(engine, BaseWeights(TINY))

    _train(engine, create(), steps=3)

    after = _sample(engine, BaseWeights(TINY))
    assert after.sequences[0].tokens.tolist() == before.sequences[0].tokens.tolist()


def test_a_state_loads_as_exactly_what_was_saved(
    engine: TorchEngine, create: Create, tmp_path: Path
) -> None:
    model_id = create(train_unembed=False)
    _train(engine, model_id, steps=2)
    first, second = _folder(tmp_path / "first"), _folder(tmp_path / "second")

    engine.save_state(model_id, first)
    engine.load_model("loaded", TINY, first, optimizer=True)
    engine.save_state("loaded", second)
    engine.drop_model("loaded")

    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        saved, again = load_file(first / name), load_file(second / name)
        assert saved.keys() == again.keys()
        assert all(np.array_equal(saved[key], again[key]) for key in saved)
    assert json.loads((second / "lora.json").read_text())["train_unembed"] is False


def test_four_steps_equal_two_saved_loaded_and_two_more(
    engine: TorchEngine, create: Create, tmp_path: Path
) -> None:
    uninterrupted = _train(engine, create(), steps=4)
    model_id = create()
    losses = _train(engine, model_id, steps=2)

    engine.save_state(model_id, tmp_path)
    engine.load_model("resumed", TINY, tmp_path, optimizer=True)

    assert losses + _train(engine, "resumed", steps=2) == uninterrupted
    engine.drop_model("resumed")


def test_a_state_loaded_without_its_optimizer_starts_adam_anew(
    engine: TorchEngine, create: Create, tmp_path: Path
) -> None:
    model_id = create()
    _train(engine, model_id, steps=3)
    engine.save_state(model_id, tmp_path)

    engine.load_model("reset", TINY, tmp_path, optimizer=False)

    kept, reset = _train(engine, model_id, steps=2), _train(engine, "reset", steps=2)
    assert kept[0] == reset[0]
    assert kept[1] != reset[1]
    engine.drop_model("reset")


def test_a_state_saved_before_the_first_step_can_be_trained_on(
    engine: TorchEngine, create: Create, tmp_path: Path
) -> None:
    uninterrupted = _train(engine, create(), steps=2)
    engine.save_state(create(), tmp_path)

    engine.load_model("early", TINY, tmp_path, optimizer=True)

    assert _train(engine, "early", steps=2) == uninterrupted
    engine.drop_model("early")


def test_sampler_logprobs_equal_forward_logprobs(
    engine: TorchEngine, create: Create, tmp_path: Path
) -> None:
    model_id = create()
    _train(engine, model_id, steps=5)
    engine.save_sampler(model_id, tmp_path)

    output = _sample(engine, SavedWeights(TINY, tmp_path))

    drawn = output.sequences[0]
    whole = bytes([*tokens_of(TEXT), *drawn.tokens.tolist()]).decode("latin-1")
    assert max(drawn.tokens) < 128, "choose another seed: the text must be ASCII"
    forward = _forward(engine, model_id, whole)
    np.testing.assert_allclose(drawn.logprobs, forward[len(TEXT) - 1 :], atol=1e-5)
    assert output.prompt_logprobs is not None
    np.testing.assert_allclose(output.prompt_logprobs[1:], forward[: len(TEXT) - 1], atol=1e-5)


def test_saved_sampler_weights_keep_as_training_goes_on(
    engine: TorchEngine, create: Create, tmp_path: Path
) -> None:
    model_id = create()
    _train(engine, model_id, steps=2)
    engine.save_sampler(model_id, tmp_path)
    before = _sample(engine, SavedWeights(TINY, tmp_path)).prompt_logprobs

    _train(engine, model_id, steps=3)

    after = _sample(engine, SavedWeights(TINY, tmp_path)).prompt_logprobs
    np.testing.assert_array_equal(after, before)


def test_sampler_weights_that_were_pushed_out_of_memory_are_read_again(
    engine: TorchEngine, create: Create, tmp_path: Path
) -> None:
    folders = [_folder(tmp_path / str(number)) for number in range(6)]  # 4 stay in memory
    model_id = create()
    before = []
    for folder in folders:
        _train(engine, model_id, steps=1)
        engine.save_sampler(model_id, folder)
        before.append(_sample(engine, SavedWeights(TINY, folder)).prompt_logprobs)

    again = [_sample(engine, SavedWeights(TINY, folder)).prompt_logprobs for folder in folders]

    np.testing.assert_array_equal(again, before)


def test_dropping_gradients_leaves_nothing_to_apply(engine: TorchEngine, create: Create) -> None:
    model_id, fresh = create(), create()
    run_slices(engine.forward_backward(cross_entropy_op(model_id, "unwanted")))

    engine.drop_gradient(model_id)

    assert _train(engine, model_id, steps=2) == _train(engine, fresh, steps=2)


def test_a_dropped_model_is_said_to_be_gone(engine: TorchEngine, create: Create) -> None:
    model_id = create()
    engine.drop_model(model_id)

    with pytest.raises(NotFoundError, match=f"No training client '{model_id}' is in memory"):
        _forward(engine, model_id)


def test_a_checkpoint_without_its_files_says_what_is_missing(
    engine: TorchEngine, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match=r"lacks lora.json"):
        engine.load_model("missing", TINY, tmp_path, optimizer=True)
