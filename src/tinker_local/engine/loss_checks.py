"""What a loss is refused for before it is computed, and after: each refusal names the place.

Numpy and plain numbers only; the arithmetic is in `losses`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tinker_local.engine.losses import LOSSES, LossSpec
from tinker_local.errors import NotServedError, UserInputError

_NOT_SERVED: Mapping[str, tuple[str, str]] = {
    "stable_reinforce": (
        "stable_reinforce is not served by tinker-local: Tinker publishes no formula for it, and "
        "it needs stability records that only Tinker's own sampler writes.",
        "Use importance_sampling, ppo or cispo.",
    ),
    "custom": (
        "The loss 'custom' is not served by tinker-local: it would run code that a client uploads.",
        "Call forward_backward_custom: it computes the loss in your own process.",
    ),
}


def loss_spec(loss_fn: str) -> LossSpec:
    """Look a loss up.

    Raises:
        NotServedError: A loss of Tinker's that this server has not.
        UserInputError: No loss of Tinker's.
    """
    if loss_fn in _NOT_SERVED:
        raise NotServedError(*_NOT_SERVED[loss_fn])
    if loss_fn not in LOSSES:
        served = ", ".join(LOSSES)
        raise UserInputError(
            f"loss_fn {loss_fn!r} is not served by tinker-local.", f"Use one of: {served}."
        )
    return LOSSES[loss_fn]


def complete_config(loss_fn: str, config: Mapping[str, float | str]) -> Mapping[str, float]:
    """Fill in the defaults of loss_fn_config.

    Raises:
        NotServedError: As for `loss_spec`.
        UserInputError: An unknown or a missing key, text, a value that is not finite or out of
            range, or a low threshold that is not below the high one.
    """
    known = loss_spec(loss_fn).config
    _check_keys(loss_fn, known, config)
    values = {
        key: _number(loss_fn, key, config.get(key, default)) for key, default in known.items()
    }
    low, high = values.get("clip_low_threshold", 0.0), values.get("clip_high_threshold", math.inf)
    if low >= high:
        raise UserInputError(
            f"{loss_fn}: clip_low_threshold {low:g} is not below clip_high_threshold {high:g}.",
            "They are ratios, as in 0.8 and 1.2, not distances from 1.",
        )
    return values


def check_inputs(
    loss_fn: str, position: int, length: int, inputs: Mapping[str, NDArray[np.generic]]
) -> None:
    """Refuse a datum that the loss cannot use, naming the datum and the input.

    Inputs that the loss does not use are ignored (the examples of Tinker's docs carry them),
    except for those that belong into loss_fn_config. Whether the ids are in the vocabulary is
    for the model to say.

    Args:
        position: The datum's place in the data.
        length: N, the positions of its model_input.

    Raises:
        NotServedError: As for `loss_spec`.
        UserInputError: A missing or misplaced input, a shape other than (N,), and for
            cross_entropy (N, K), shapes that differ, targets that are no integers, a value that
            is not finite, or a mask that is negative or 0 throughout.
    """
    spec = loss_spec(loss_fn)
    place = f"data[{position}]"
    for name in spec.config:
        if name in inputs:
            raise UserInputError(
                f"{place}.loss_fn_inputs[{name!r}] would change nothing.",
                f"Give {name} in loss_fn_config: one number for the whole request.",
            )
    for name in spec.inputs:
        if name not in inputs:
            raise UserInputError(
                f"{place} lacks loss_fn_inputs[{name!r}], which {loss_fn} needs.",
                f"Give {name} as an array of {length} values, one a position of model_input.",
            )
    for name in (*spec.inputs, *spec.optional):
        if name in inputs:
            _check_shape(f"{place}.loss_fn_inputs[{name!r}]", name, spec, length, inputs)
            _check_values(f"{place}.loss_fn_inputs[{name!r}]", name, inputs[name])


def check_finite(loss_fn: str, positions: Sequence[int], losses: Sequence[float]) -> None:
    """Refuse losses that overflowed, before they are backpropagated into every weight.

    Args:
        positions: The places of the datums in the data.
        losses: The loss of each.

    Raises:
        UserInputError: The first loss that is infinite or NaN.
    """
    for position, loss in zip(positions, losses, strict=True):
        if not math.isfinite(loss):
            raise UserInputError(
                f"The {loss_fn} of data[{position}] is {loss}: its inputs are too large, or its "
                "logprobs too far from the model's (exp overflows above 88 nats).",
                "Check logprobs and advantages; a position to leave out has advantage 0.",
            )


def _check_keys(
    loss_fn: str, known: Mapping[str, float | None], config: Mapping[str, float | str]
) -> None:
    unknown = sorted(set(config) - set(known))
    if unknown and not known:
        raise UserInputError(
            f"{loss_fn} takes no loss_fn_config, got {unknown}.", "Leave loss_fn_config out."
        )
    if unknown:
        raise UserInputError(
            f"{loss_fn} has no loss_fn_config {unknown}.", f"Its keys are {', '.join(known)}."
        )
    missing = [key for key, default in known.items() if default is None and key not in config]
    if missing:
        raise UserInputError(
            f"{loss_fn} needs loss_fn_config {missing}: Tinker does not document its default, so "
            "tinker-local assumes none.",
            "Name a value for each, as a number.",
        )


def _number(loss_fn: str, key: str, value: float | str | None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserInputError(
            f"{loss_fn}: loss_fn_config[{key!r}] is {value!r}, no number.", "Give a number."
        )
    if not math.isfinite(value) or value < 0:
        raise UserInputError(
            f"{loss_fn}: loss_fn_config[{key!r}] is {value:g}.", "Give a finite number from 0 up."
        )
    return float(value)


def _check_shape(
    place: str,
    name: str,
    spec: LossSpec,
    length: int,
    inputs: Mapping[str, NDArray[np.generic]],
) -> None:
    shape, targets = inputs[name].shape, inputs["target_tokens"].shape
    has_several = spec.several_targets and len(targets) == 2
    if has_several and shape == targets and shape[0] == length and shape[1] > 0:
        return
    if not has_several and shape == (length,):
        return
    wanted = (length, targets[1] or "K") if has_several else (length,)
    raise UserInputError(
        f"{place} has shape {list(shape)}, but model_input has {length} positions"
        + (f" and target_tokens has shape {list(targets)}." if has_several else "."),
        f"Give {name} the shape [{', '.join(map(str, wanted))}]: inputs are tokens[:-1], targets "
        "tokens[1:].",
    )


def _check_values(place: str, name: str, values: NDArray[np.generic]) -> None:
    if name == "target_tokens" and values.dtype.kind != "i":
        raise UserInputError(f"{place} is {values.dtype}.", "Give token ids as int64.")
    outside = values[~np.isfinite(values)]
    if outside.size:
        # One such value would turn every weight of the adapter into NaN.
        raise UserInputError(f"{place} holds {outside[0]}.", "Give finite values only.")
    if name == "sequence_ratio_mask" and (values.min() < 0 or not values.any()):
        raise UserInputError(
            f"{place} is negative somewhere or 0 throughout: the sequence has no mean ratio.",
            "Set it to 1 at the tokens that were sampled and to 0 elsewhere.",
        )
