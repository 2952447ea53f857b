"""Datums as one file: token ids, targets and weights of all, one after the other, and lengths.

Knows the datums of sft and dpo: one run of token ids, a target and a weight a position.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinker_mcp.errors import InvalidInputError

if TYPE_CHECKING:
    import tinker

_VERSION = "1"
_COLUMNS = ("target_tokens", "weights")
_DTYPES = {"target_tokens": "int64", "weights": "float32"}


def save(path: Path, datums: Sequence[tinker.Datum]) -> str:
    """Write datums to a file that is whole or not there, for its owner only; its sha256. Blocks.

    Raises:
        InvalidInputError: There is none, or one holds something else than token ids and, for
            each of them, one int64 `target_tokens` and one float32 `weights`.
    """
    content = packed(datums)
    _write(path, content)
    return hashlib.sha256(content).hexdigest()


def packed(datums: Sequence[tinker.Datum]) -> bytes:
    """The content of that file: equal datums give equal bytes.

    Raises:
        InvalidInputError: As for `save`.
    """
    from safetensors.numpy import save as as_safetensors

    if not datums:
        raise InvalidInputError("There is no datum to keep.", next_step="Give one or more.")
    tokens = [_tokens(index, datum) for index, datum in enumerate(datums)]
    arrays: dict[str, npt.NDArray[Any]] = {
        "lengths": np.array([len(one) for one in tokens], dtype=np.int64),  # (D,)
        "tokens": np.concatenate(tokens),  # (sum of lengths,), as all below
    }
    for name in _COLUMNS:
        columns = [
            _column(index, datum, name, len(one))
            for index, (datum, one) in enumerate(zip(datums, tokens, strict=True))
        ]
        arrays[name] = np.concatenate(columns)
    return as_safetensors(arrays, metadata={"version": _VERSION})


def load(path: Path) -> list[tinker.Datum]:
    """The datums of a file, equal to those that were saved but for chunks, now one each. Blocks.

    Raises:
        InvalidInputError: It cannot be read, or `save` has not written it.
    """
    import tinker

    arrays = _read(path)
    ends = np.cumsum(arrays["lengths"])
    cuts = ends[:-1]
    tokens, targets, weights = (np.split(arrays[name], cuts) for name in ("tokens", *_COLUMNS))
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens_of.tolist()),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData.from_numpy(targets_of.copy()),
                "weights": tinker.TensorData.from_numpy(weights_of.copy()),
            },
        )
        for tokens_of, targets_of, weights_of in zip(tokens, targets, weights, strict=True)
    ]


def _tokens(index: int, datum: tinker.Datum) -> npt.NDArray[np.int64]:
    if datum.model_input_spans is not None:
        raise _unfit(index, "it carries provenance spans")
    if set(datum.loss_fn_inputs) != set(_COLUMNS):
        raise _unfit(index, f"its loss_fn_inputs are {sorted(datum.loss_fn_inputs)}")
    try:
        return np.array(datum.model_input.to_ints(), dtype=np.int64)
    except ValueError as error:
        kinds = sorted({type(chunk).__name__ for chunk in datum.model_input.chunks})
        raise _unfit(index, f"its model_input holds {', '.join(kinds)}") from error


def _column(index: int, datum: tinker.Datum, name: str, positions: int) -> npt.NDArray[Any]:
    tensor = datum.loss_fn_inputs[name]
    values = tensor.to_numpy()
    if tensor.sparse_crow_indices is not None or tensor.dtype != _DTYPES[name]:
        raise _unfit(index, f"{name} is not dense {_DTYPES[name]}")
    if values.shape != (positions,):
        raise _unfit(index, f"{name} has shape {values.shape} for {positions} positions")
    return values


def _unfit(index: int, what: str) -> InvalidInputError:
    return InvalidInputError(
        f"Datum {index} cannot be kept for a run: {what}.",
        next_step="A run takes token ids with a target token (int64) and a weight (float32) each, "
        "as build_datums makes them for sft and dpo.",
    )


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_safetensors

    try:
        arrays: dict[str, npt.NDArray[Any]] = from_safetensors(path.read_bytes())
        total = int(arrays["lengths"].sum())
        is_whole = all(arrays[name].shape == (total,) for name in ("tokens", *_COLUMNS))
    except (OSError, SafetensorError, KeyError) as error:
        raise _unusable(path, str(error)) from error
    if not is_whole:
        raise _unusable(path, "its arrays have different lengths")
    return arrays


def _unusable(path: Path, what: str) -> InvalidInputError:
    return InvalidInputError(
        f"The run's data {str(path)!r} cannot be read: {what}.",
        next_step="Call start_run again with the data it was started with.",
    )
