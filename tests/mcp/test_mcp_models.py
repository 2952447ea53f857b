"""Advice on a model, each with its source, and never from the network."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tinker_mcp.training import models, rendering
from tinker_mcp.training.backend import Backend


def test_qwen_gets_the_cookbooks_learning_rate() -> None:
    from tinker_cookbook.hyperparam_utils import get_lr

    advice = models.learning_rate("Qwen/Qwen3-8B")
    assert advice.value == get_lr("Qwen/Qwen3-8B")
    assert "get_lr" in advice.source


def test_a_family_that_the_formula_leaves_out_gets_the_sweeps_favourite() -> None:
    advice = models.learning_rate("openai/gpt-oss-20b")
    assert advice.value == 3e-4
    assert "14 of 27 models" in advice.source


def test_an_unknown_model_gets_the_sweeps_favourite_without_a_look_at_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models.learning_rate("Qwen/Qwen3-8B")  # the imports are not what is measured
    monkeypatch.setattr("socket.socket.connect", _refuse)
    began = time.monotonic()
    advice = models.learning_rate("nobody/no-such-model")
    assert (advice.value, time.monotonic() - began < 1) == (3e-4, True)


def test_a_known_model_needs_no_tokenizer_for_its_renderer() -> None:
    advice = models.renderer("Qwen/Qwen3-8B", _refuse)
    assert advice == models.Advice("qwen3", "tinker_cookbook.model_info")


@pytest.mark.parametrize("name", ["tinker-local/tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_an_unknown_model_gets_the_renderer_that_equals_its_chat_template(
    name: str, backend: Backend, hub_cache: Path
) -> None:
    if not (hub_cache / f"models--{name.replace('/', '--')}").exists():
        pytest.skip(f"{name} is not in the cache")
    advice = rendering.advice(backend, name)
    assert advice == models.Advice(
        "qwen3_instruct", "equals the model's chat template token for token"
    )


def test_a_tokenizer_without_a_chat_template_gets_plain_roles() -> None:
    advice = models.renderer("nobody/base", object)
    assert advice == models.Advice("role_colon", "the tokenizer has no chat template")


def test_without_a_tokenizer_there_is_no_advice(backend: Backend) -> None:
    assert rendering.advice(backend, "nobody/no-such-model") is None


def test_a_retired_model_is_told_with_its_day_and_its_replacement() -> None:
    served = ["Qwen/Qwen3.6-35B-A3B", "Qwen/Qwen3-8B"]
    problem, fix = models.absent("Qwen/Qwen3-30B-A3B", served)
    assert problem == (
        "'Qwen/Qwen3-30B-A3B' is not among the 2 models that can be trained here: Tinker retired "
        "it on 2026-06-12"
    )
    assert 'base_model="Qwen/Qwen3.6-35B-A3B", its replacement by https://tinker-docs' in fix
    assert (
        'base_model="Qwen/Qwen3-8B", which is the nearest in size'
        in models.absent("meta-llama/Llama-3.1-8B", served)[1]
    )


def test_what_a_backend_serves_is_never_called_retired() -> None:
    problem, fix = models.absent("Qwen/Qwen3-9B", ["Qwen/Qwen3-8B"])
    assert "retired" not in problem
    assert "Qwen/Qwen3-8B" in fix


def test_a_known_model_may_be_rendered_in_more_than_one_way() -> None:
    assert set(models.fitting_renderers("Qwen/Qwen3-8B", _refuse)) >= {
        "qwen3",
        "qwen3_disable_thinking",
    }


def _refuse(*_: object) -> None:
    raise AssertionError("looked on the network, or at a tokenizer")
