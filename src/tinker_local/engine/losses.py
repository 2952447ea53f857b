"""The arithmetic of the losses: sums over tokens, as Tinker defines them.

With lp = log p(target_tokens) of one datum, shape (N,), float32, in nats:

    cross_entropy   -sum(weights * lp), weights 1 where none are given

Source: tinker-docs.thinkingmachines.ai, "Loss functions".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from tinker_local.errors import UserInputError

LossFn = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target.

    Args:
        logits: (M, vocabulary), any float format; the softmax is taken in float32.
        targets: Token ids, (M,), int64.

    Returns:
        (M,), float32, in nats.
    """
    logits = logits.float()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def cross_entropy(logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """-sum(weights * logprobs) over one datum; both (N,)."""
    weighted = inputs["weights"] * logprobs if "weights" in inputs else logprobs
    return -weighted.sum()


LOSSES: Mapping[str, LossFn] = {"cross_entropy": cross_entropy}
REQUIRED_INPUTS: Mapping[str, tuple[str, ...]] = {"cross_entropy": ("target_tokens",)}
OPTIONAL_INPUTS: Mapping[str, tuple[str, ...]] = {"cross_entropy": ("weights",)}  # SDK docstrings


def check_inputs(
    loss_fn: str,
    config: Mapping[str, float | str],
    position: int,
    length: int,
    inputs: Mapping[str, NDArray[np.generic]],
) -> None:
    """Refuse a datum that the loss cannot use, naming the datum and the input.

    Raises:
        UserInputError: An unknown loss or config key, a missing input, a shape other than
            (length,), targets that are no integers, or a value that is not finite.
    """
    if loss_fn not in LOSSES:
        served = ", ".join(LOSSES)
        raise UserInputError(
            f"loss_fn {loss_fn!r} is not served by tinker-local.", f"Use one of: {served}."
        )
    if config:
        raise UserInputError(
            f"{loss_fn} takes no loss_fn_config, got {sorted(config)}.", "Leave loss_fn_config out."
        )
    for name in REQUIRED_INPUTS[loss_fn]:
        if name not in inputs:
            raise UserInputError(
                f"data[{position}] lacks loss_fn_inputs[{name!r}], which {loss_fn} needs.",
                f"Give {name} as an array of {length} values, one a position of model_input.",
            )
    used = (*REQUIRED_INPUTS[loss_fn], *OPTIONAL_INPUTS[loss_fn])
    for name in [name for name in used if name in inputs]:
        if inputs[name].shape != (length,):
            raise UserInputError(
                f"data[{position}].loss_fn_inputs[{name!r}] has shape "
                f"{list(inputs[name].shape)}, but model_input has {length} positions.",
                f"Give {name} the shape [{length}]: inputs are tokens[:-1], targets tokens[1:].",
            )
        _check_values(f"data[{position}].loss_fn_inputs[{name!r}]", name, inputs[name])


def _check_values(place: str, name: str, values: NDArray[np.generic]) -> None:
    if name == "target_tokens" and values.dtype.kind != "i":
        raise UserInputError(f"{place} is {values.dtype}.", "Give token ids as int64.")
    outside = values[~np.isfinite(values)]
    if outside.size:
        # One such value would turn every weight of the adapter into NaN.
        raise UserInputError(f"{place} holds {outside[0]}.", "Give finite values only.")
