"""Datums in one file: what comes back, and what cannot be kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tinker

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs import data


def datum(*chunks: list[int], weights: list[float], targets: list[int]) -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput(
            chunks=[tinker.types.EncodedTextChunk(tokens=chunk) for chunk in chunks]
        ),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=targets, dtype="int64"),
            "weights": tinker.TensorData(data=weights, dtype="float32"),
        },
    )


SHORT = datum([1], targets=[2], weights=[0.1])
LONG = datum([7, 8], [9], targets=[8, 9, 2**40], weights=[0.0, 1.0, 1 / 3])


def test_what_is_loaded_equals_what_was_saved_with_its_chunks_joined(tmp_path: Path) -> None:
    sha256 = data.save(tmp_path / "new" / "train.safetensors", [SHORT, LONG])
    first, second = data.load(tmp_path / "new" / "train.safetensors")
    assert first.model_input == SHORT.model_input
    assert second.model_input == tinker.ModelInput.from_ints([7, 8, 9])
    for saved, loaded in ((SHORT, first), (LONG, second)):
        for name in ("target_tokens", "weights"):
            theirs, ours = saved.loss_fn_inputs[name], loaded.loss_fn_inputs[name]
            assert (ours.tolist(), ours.dtype, ours.shape) == (
                theirs.tolist(),
                theirs.dtype,
                [len(theirs.tolist())],
            )
    content = (tmp_path / "new" / "train.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256


def test_equal_datums_have_the_same_hash_and_others_another(tmp_path: Path) -> None:
    joined = datum([7, 8, 9], targets=[8, 9, 2**40], weights=[0.0, 1.0, 1 / 3])
    hashes = [data.save(tmp_path / name, [one]) for name, one in (("a", LONG), ("b", joined))]
    assert hashes[0] == hashes[1]
    assert data.save(tmp_path / "c", [LONG, SHORT]) != data.save(tmp_path / "d", [SHORT, LONG])


def test_only_the_owner_can_read_it_and_nothing_else_is_left(tmp_path: Path) -> None:
    data.save(tmp_path / "train", [SHORT])
    data.save(tmp_path / "train", [LONG])
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert (tmp_path / "train").stat().st_mode & 0o777 == 0o600


TARGETS = tinker.TensorData(data=[2], dtype="int64")
WEIGHTS = tinker.TensorData(data=[1.0], dtype="float32")


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ({"target_tokens": TARGETS}, "its loss_fn_inputs are ['target_tokens']"),
        (
            {"target_tokens": TARGETS, "weights": WEIGHTS, "mask": WEIGHTS},
            "['mask', 'target_tokens', 'weights']",
        ),
        ({"target_tokens": WEIGHTS, "weights": WEIGHTS}, "target_tokens is not dense int64"),
        (
            {"target_tokens": TARGETS, "weights": tinker.TensorData([1.0, 1.0], "float32")},
            "weights has shape (2,) for 1 positions",
        ),
    ],
)
def test_other_columns_are_refused_by_the_datums_number(
    inputs: Any, what: str, tmp_path: Path
) -> None:
    odd = tinker.Datum(model_input=tinker.ModelInput.from_ints([1]), loss_fn_inputs=inputs)
    with pytest.raises(InvalidInputError) as refused:
        data.save(tmp_path / "train", [SHORT, odd])
    assert "Datum 1 " in str(refused.value)
    assert what in str(refused.value)
    assert not (tmp_path / "train").exists()


def test_an_image_is_refused(tmp_path: Path) -> None:
    image = tinker.types.ImageChunk(data=b"png", format="png", expected_tokens=1)
    odd = tinker.Datum(
        model_input=tinker.ModelInput(chunks=[image]),
        loss_fn_inputs={"target_tokens": TARGETS, "weights": WEIGHTS},
    )
    with pytest.raises(InvalidInputError, match="its model_input holds ImageChunk"):
        data.save(tmp_path / "train", [odd])


def test_no_datum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no datum"):
        data.save(tmp_path / "train", [])


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "train"
    data.save(path, [SHORT, LONG])
    path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
    with pytest.raises(InvalidInputError, match="train' cannot be read"):
        data.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="No such file"):
        data.load(tmp_path / "train")
