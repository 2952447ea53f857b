from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinker_local.weights import TINY_MODEL, ModelFiles, quiet_progress, resolve_model


@pytest.fixture(scope="module")
def tokenizer(tiny: ModelFiles) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.folder, local_files_only=True)


def test_two_caches_get_the_same_bytes(tiny: ModelFiles, cache: Path) -> None:
    other = resolve_model(TINY_MODEL, cache, progress=quiet_progress)

    assert other.folder != tiny.folder
    assert _contents(other.folder) == _contents(tiny.folder)


def test_the_second_time_it_is_only_found(resolve: Any) -> None:
    first = resolve(TINY_MODEL)
    made_at_ns = (first.folder / "model.safetensors").stat().st_mtime_ns

    assert resolve(TINY_MODEL) == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == made_at_ns


def test_making_it_leaves_the_global_random_state_alone(resolve: Any) -> None:
    import torch

    torch.manual_seed(7)
    before = torch.get_rng_state()

    resolve(TINY_MODEL)

    assert torch.equal(torch.get_rng_state(), before)


def test_making_it_prints_nothing(resolve: Any, capfd: pytest.CaptureFixture[str]) -> None:
    resolve(TINY_MODEL)

    assert capfd.readouterr() == ("", "")


def test_transformers_loads_every_parameter(tiny: ModelFiles) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tiny.folder, local_files_only=True, output_loading_info=True
    )
    model, report = loaded

    assert not any(report.values())
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 4096
    # embeddings 259 x 64; a layer 2 x 64 + 2 x 64x64 + 2 x 32x64 + 3 x 128x64; the last norm 64
    assert sum(p.numel() for p in model.parameters()) == 16_576 + 2 * 36_992 + 64


def test_a_token_id_is_the_byte_it_stands_for(tokenizer: Any) -> None:
    assert tokenizer.encode("Hé\n") == [0x48, 0xC3, 0xA9, 0x0A]


def test_the_special_tokens_follow_the_bytes(tokenizer: Any) -> None:
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [256, 257, 258]
    assert len(tokenizer) == 259


@settings(max_examples=300, deadline=None, database=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_its_bytes(tokenizer: Any, text: str) -> None:
    assume("<|" not in text)
    ids = tokenizer.encode(text)

    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
