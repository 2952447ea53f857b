"""Which architectures are served as transformers computes them, and which are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_data import plain_logits, plain_logprobs, plain_model, random_adapter

from tinker_local.engine import gradients
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.sampler import Sampler
from tinker_local.errors import ModelFolderError, NotServedError
from tinker_local.ops import BaseModelInfo, BaseWeights, Sample
from tiny_data import cross_entropy_op, run_slices, tokens_of

Make = Callable[..., Path]

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that logits differ between tokens
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}

SERVED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},  # biases on q, k and v
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},  # norms on q and k; 4 * 16 > 32
    "mistral": {"sliding_window": None},
}


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Make:
    """`make(model_type, ...)` writes a random model with the tiny one's tokenizer."""

    def write(model_type: str, **changed: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = tmp_path / model_type
        shutil.copytree(tiny_folder, folder)
        (folder / "model.safetensors").unlink()
        config = AutoConfig.for_model(model_type, **{**SIZES, **changed})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # transformers makes them zero
                    parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        model.save_pretrained(folder)
        return folder

    return write


def _load(folder: Path) -> BaseModel:
    info = BaseModelInfo("org/random", folder, 128)
    return BaseModel(info, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("model_type", SERVED)
def test_a_served_architecture_has_the_logprobs_of_transformers(
    make: Make, model_type: str
) -> None:
    folder = make(model_type, **SERVED[model_type])
    model, plain = _load(folder), plain_model(folder)
    adapter = random_adapter(model)
    texts = ("the cat sat on the mat", "a dog", "it is a long way from here")

    trained = run_slices(gradients.run(cross_entropy_op("any", *texts), model, adapter))

    for text, ours in zip(texts, trained.logprobs, strict=True):
        theirs = plain_logprobs(plain, adapter, tokens_of(text)).detach()
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    assert trained.logprobs[0].std() > 1, "too alike to tell one computation from another"


@pytest.mark.parametrize("model_type", SERVED)
def test_a_served_architecture_samples_with_the_logprobs_of_transformers(
    make: Make, model_type: str
) -> None:
    folder = make(model_type, **SERVED[model_type])
    model, plain = _load(folder), plain_model(folder)
    adapter = random_adapter(model)
    prompt = tokens_of("the cat")
    drawing = Sampler(model, adapter)
    drawing.start(
        "only",
        Sample(BaseWeights("any"), np.array(prompt), 3, max_tokens=20, stop_tokens=[], seed=1),
    )
    for _ in range(18):
        assert not drawing.step()

    for drawn in drawing.step()["only"].sequences:
        tokens = [*prompt, *drawn.tokens.tolist()]
        theirs = plain_logprobs(plain, adapter, tokens)[len(prompt) - 1 :].detach()
        np.testing.assert_allclose(drawn.logprobs, theirs.numpy(), atol=1e-4)
    without = plain_logits(plain, None, prompt)
    assert not torch.allclose(without, plain_logits(plain, adapter, prompt), atol=0.1)


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("gemma2", {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0}),
    ],
)
def test_an_architecture_that_scales_or_caps_its_logits_is_refused(
    make: Make, model_type: str, changed: dict[str, Any]
) -> None:
    folder = make(model_type, **changed)

    with pytest.raises(ModelFolderError) as caught:
        _load(folder)

    assert caught.value.problem.startswith("org/random")
    assert "Llama, Qwen" in caught.value.next_step


WINDOW = {"sliding_window": 24}


def test_sequences_packed_within_the_window_are_served(make: Make) -> None:
    folder = make("mistral", **WINDOW)
    model, plain = _load(folder), plain_model(folder)
    adapter = random_adapter(model)
    texts = ("the cat sat on the mat", "a dog was on the way")  # 22 and 20, 42 in all

    trained = run_slices(gradients.run(cross_entropy_op("any", *texts), model, adapter))

    for text, ours in zip(texts, trained.logprobs, strict=True):
        theirs = plain_logprobs(plain, adapter, tokens_of(text)).detach()
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


def test_a_training_sequence_beyond_the_window_is_refused(make: Make) -> None:
    model = _load(make("mistral", **WINDOW))

    with pytest.raises(NotServedError, match="looks back over 24 tokens only"):
        op = cross_entropy_op("any", "x" * 30)
        run_slices(gradients.run(op, model, random_adapter(model)))


def test_a_sample_that_grows_beyond_the_window_is_refused(make: Make) -> None:
    model = _load(make("mistral", **WINDOW))
    drawing = Sampler(model, None)
    prompt = np.array(tokens_of("x" * 20))
    drawing.start("only", Sample(BaseWeights("any"), prompt, max_tokens=10, stop_tokens=[]))

    with pytest.raises(NotServedError, match="looks back over 24 tokens only"):
        for _ in range(9):
            drawing.step()
