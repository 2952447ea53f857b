"""The fused forward and backward pass against transformers' modules under autograd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_data import SOME, by_modules, only, random_adapter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.lora import Adapter
from tinker_local.engine.packed import PackedSequences
from tinker_local.ops import BaseModelInfo
from tiny_data import tokens_of

CPU = torch.device("cpu")
TEXT = torch.tensor(tokens_of("the cat sat on the mat and the dog ran"))

LAYOUTS = {
    "one sequence": (0, [len(TEXT)]),
    "several": (0, [11, 9, len(TEXT) - 20]),
    "after a prefix": (8, [10, 3, len(TEXT) - 21]),
}

SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

CONFIGS: Mapping[str, PreTrainedConfig] = {
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}


@dataclass(frozen=True)
class _Passed:
    """What a forward and a backward pass gave."""

    hidden: torch.Tensor
    gradients: Mapping[str, torch.Tensor]


def _pass(model: BaseModel, adapter: Adapter, layout: str = "several") -> _Passed:
    prefix, lengths = LAYOUTS[layout]
    for parameter in adapter.parameters():
        parameter.grad = None
    with model.adapted(adapter):
        hidden = model.hidden_states(TEXT, PackedSequences(prefix, lengths, CPU))
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        (hidden * weights).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for path, factors in adapter.factors.items():
        for name, matrix in (("a", factors.a), ("b", factors.b)):
            if "lm_head" not in path:  # it comes after the hidden states
                assert matrix.grad is not None
                gradients[f"{path}.{name}"] = matrix.grad
    return _Passed(hidden.detach(), gradients)


def _both(model: BaseModel, adapter: Adapter, layout: str = "several") -> tuple[_Passed, _Passed]:
    ours = _pass(model, adapter, layout)
    with by_modules(model):
        return ours, _pass(model, adapter, layout)


def _error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative, in the norm."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def _assert_equal(ours: _Passed, theirs: _Passed) -> None:
    """Up to the rounding of float32."""
    assert _error(ours.hidden, theirs.hidden) < 1e-5
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert gradient.any(), name
        assert _error(ours.gradients[name], gradient) < 2e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_and_gradients_are_those_of_transformers_modules(
    base_model: BaseModel, layout: str
) -> None:
    _assert_equal(*_both(base_model, random_adapter(base_model), layout))


@pytest.mark.parametrize("parts", [p for p in SOME.values() if p != ("lm_head",)], ids=str)
@pytest.mark.parametrize("rank", [4, 48])
def test_an_adapter_of_some_layers_has_the_gradients_of_transformers_modules(
    base_model: BaseModel, parts: tuple[str, ...], rank: int
) -> None:
    adapter = only(random_adapter(base_model, rank=rank), parts)

    _assert_equal(*_both(base_model, adapter))


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_architectures_have_theirs_too(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)
    tokenizer.save_pretrained(tmp_path)
    config = CONFIGS[kind]
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        module: Any = AutoModelForCausalLM.from_config(config)
        for parameter in module.parameters():  # norms and biases that do something, too
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    module.save_pretrained(tmp_path)
    model = BaseModel(BaseModelInfo("org/random", tmp_path, 128), torch.float32, CPU)

    _assert_equal(*_both(model, random_adapter(model)))


def test_in_bfloat16_it_is_as_close_to_float32_as_the_modules_are(
    base_model: BaseModel, half_model: BaseModel
) -> None:
    adapter = random_adapter(base_model, deviation=0.2)
    with by_modules(base_model):
        exact = _pass(base_model, adapter)

    ours, theirs = (_errors(passed, exact) for passed in _both(half_model, adapter))

    assert ours["hidden"] < 1.5 * theirs["hidden"]
    assert sum(ours.values()) < 1.2 * sum(theirs.values())


def _errors(passed: _Passed, exact: _Passed) -> Mapping[str, float]:
    gradients = exact.gradients
    return {"hidden": _error(passed.hidden, exact.hidden)} | {
        name: _error(gradient, gradients[name]) for name, gradient in passed.gradients.items()
    }


def test_joined_layers_share_their_memory_with_the_modules(base_model: BaseModel) -> None:
    assert base_model._joined is not None
    qkv = base_model._joined.layers[0].qkv
    names = ("q_proj", "k_proj", "v_proj")
    own = [base_model.layers[f"model.layers.0.self_attn.{name}"].weight for name in names]

    assert torch.equal(torch.cat(own), qkv.weight)
    assert own[0].data_ptr() == qkv.weight.data_ptr()


def test_the_hidden_states_without_gradients_are_the_same(base_model: BaseModel) -> None:
    adapter = random_adapter(base_model, deviation=0.2)
    layout = PackedSequences(0, [len(TEXT)], CPU)

    with base_model.adapted(adapter):
        recorded = base_model.hidden_states(TEXT, layout)
        with torch.inference_mode():
            unrecorded = base_model.hidden_states(TEXT, layout)

    assert recorded.requires_grad
    assert not unrecorded.requires_grad
    torch.testing.assert_close(recorded.detach(), unrecorded, atol=0, rtol=0)
