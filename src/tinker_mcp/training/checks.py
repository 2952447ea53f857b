"""What the SDK does not check of a datum before it sends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tinker

_DTYPES = {
    "target_tokens": "int64",
    "weights": "float32",
    "logprobs": "float32",
    "advantages": "float32",
    "mask": "float32",
}


def datum_problem(datum: tinker.Datum, vocabulary_size: int) -> str | None:
    """Why a backend would refuse a datum, or learn nothing from it; None when all is well.

    Looks at lengths (one value a position), dtypes, token ids (below `vocabulary_size`), and that
    the other values are finite and those that say what is trained not all 0.
    """
    positions = datum.model_input.length
    if positions < 1:
        return "it has no position"
    if "target_tokens" not in datum.loss_fn_inputs:
        return "it has no target_tokens"
    for name, tensor in datum.loss_fn_inputs.items():
        what = _column_problem(name, tensor, positions)
        if what:
            return what
    return _token_problem(datum, vocabulary_size)


def _column_problem(name: str, tensor: tinker.TensorData, positions: int) -> str | None:
    import numpy as np

    dtype = _DTYPES.get(name, tensor.dtype)
    values = tensor.to_numpy()
    if tensor.dtype != dtype:
        return f"{name} are {tensor.dtype}, not {dtype}"
    if len(values) != positions:
        return f"{name} has {len(values)} values for {positions} positions"
    if tensor.dtype == "float32" and not np.isfinite(values).all():
        return f"{name} are not all finite"
    return "all weights are 0" if name == "weights" and not values.any() else None


def _token_problem(datum: tinker.Datum, vocabulary_size: int) -> str | None:
    tokens = datum.loss_fn_inputs["target_tokens"].tolist()
    for chunk in datum.model_input.chunks:
        tokens += getattr(chunk, "tokens", ())
    low, high = min(tokens), max(tokens)
    if low >= 0 and high < vocabulary_size:
        return None
    wrong = low if low < 0 else high
    return f"token {wrong} is not among the {vocabulary_size} of the vocabulary"
