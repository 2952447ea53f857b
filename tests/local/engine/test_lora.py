from __future__ import annotations

import pytest
import torch

from tinker_local.engine import lora
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.packed import PackedSequences
from tinker_local.engine.torch_engine import TorchEngine
from tinker_local.errors import UserInputError
from tinker_local.ops import LoraSpec

TOKENS = torch.tensor(list(b"hello"))


def _logits(model: BaseModel, adapter: lora.Adapter | None) -> torch.Tensor:
    with torch.inference_mode(), lora.active(model.layers, adapter):
        layout = PackedSequences(0, [len(TOKENS)], TOKENS.device)
        return model.logits(model.hidden_states(TOKENS, layout))


def _changed(adapter: lora.Adapter) -> lora.Adapter:
    """Fill every B, so that the adapter changes something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factors in adapter.factors.values():
            factors.b.normal_(0, 0.1, generator=generator)
    return adapter


def test_a_fresh_adapter_changes_nothing(base_model: BaseModel) -> None:
    adapter = lora.new_adapter(base_model.layers, LoraSpec(rank=4, seed=0))

    assert torch.equal(_logits(base_model, adapter), _logits(base_model, None))


def test_an_active_adapter_adds_alpha_over_rank_times_b_a_x(base_model: BaseModel) -> None:
    layer = base_model.layers["model.layers.0.self_attn.q_proj"]
    a, b, x = torch.randn(4, 64), torch.randn(64, 4), torch.randn(3, 64)
    adapter = lora.Adapter(
        LoraSpec(rank=4), {"model.layers.0.self_attn.q_proj": lora.Factors(a, b)}
    )

    with lora.active(base_model.layers, adapter):
        output = layer(x)

    assert torch.allclose(output, x @ (layer.weight + 32 / 4 * b @ a).T, atol=1e-4)


def test_after_its_block_the_base_model_is_itself_again(base_model: BaseModel) -> None:
    before = _logits(base_model, None)

    changed = _logits(
        base_model, _changed(lora.new_adapter(base_model.layers, LoraSpec(rank=4, seed=0)))
    )

    assert not torch.allclose(changed, before, atol=1e-3)
    assert torch.equal(_logits(base_model, None), before)


def test_an_error_inside_the_block_deactivates_the_adapter_too(base_model: BaseModel) -> None:
    adapter = lora.new_adapter(base_model.layers, LoraSpec(rank=4, seed=0))

    with pytest.raises(ZeroDivisionError), lora.active(base_model.layers, adapter):
        raise ZeroDivisionError

    assert all(layer.active is None for layer in base_model.layers.values())


def test_the_same_seed_gives_the_same_adapter(base_model: BaseModel) -> None:
    first, second = (
        lora.new_adapter(base_model.layers, LoraSpec(rank=4, seed=5)).parameters() for _ in range(2)
    )

    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_without_a_seed_two_adapters_differ(base_model: BaseModel) -> None:
    first, second = (
        lora.new_adapter(base_model.layers, LoraSpec(rank=4)).parameters() for _ in range(2)
    )

    assert not torch.equal(first[0], second[0])


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("flags", "layers", "outside"),
    [
        ({"train_mlp": False, "train_unembed": False}, ATTENTION, set()),
        ({"train_attn": False, "train_unembed": False}, MLP, set()),
        ({"train_attn": False, "train_mlp": False}, set(), {"lm_head"}),
        ({}, ATTENTION | MLP, {"lm_head"}),
    ],
)
def test_the_flags_choose_exactly_these_modules_of_every_layer(
    base_model: BaseModel, flags: dict[str, bool], layers: set[str], outside: set[str]
) -> None:
    adapter = lora.new_adapter(base_model.layers, LoraSpec(rank=2, **flags))

    names = [path.rpartition(".")[2] for path in adapter.factors]
    assert set(names) == layers | outside
    assert len(names) == 2 * len(layers) + len(outside)  # the tiny model has two layers


def test_an_adapter_of_nothing_is_refused(engine: TorchEngine) -> None:
    spec = LoraSpec(train_mlp=False, train_attn=False, train_unembed=False)

    with pytest.raises(UserInputError, match="Nothing would be trained"):
        engine.create_model("none", "tinker-local/tiny", spec)


@pytest.mark.parametrize("rank", [0, 513])
def test_a_rank_out_of_range_is_refused(engine: TorchEngine, rank: int) -> None:
    with pytest.raises(UserInputError, match=f"rank {rank}.*1 to 512"):
        engine.create_model("ranked", "tinker-local/tiny", LoraSpec(rank=rank))


def test_an_unserved_base_model_names_the_served_ones(engine: TorchEngine) -> None:
    with pytest.raises(UserInputError, match=r"'org/other' is not served.*tinker-local/tiny"):
        engine.create_model("other", "org/other", LoraSpec())
