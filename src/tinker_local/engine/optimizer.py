"""AdamW over one adapter, with its hyper-parameters given anew at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tinker_local.errors import UserInputError
from tinker_local.ops import AdamParams


class AdamW:
    """`torch.optim.AdamW` whose learning rate, betas and decay come with each step, as in Tinker.

    Weight decay is decoupled: parameters shrink by learning_rate * weight_decay.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = parameters
        self._torch = torch.optim.AdamW(parameters)

    def step(self, params: AdamParams) -> Mapping[str, float]:
        """Apply the accumulated gradient and clear it.

        Returns:
            `grad_norm`: the global L2 norm before clipping.

        Raises:
            UserInputError: A value that AdamW cannot use, no gradient to apply, or one that is
                not finite, which is dropped: applied, it would leave nothing but NaN.
        """
        _check(params)
        if all(parameter.grad is None for parameter in self._parameters):
            raise UserInputError(
                "optim_step has no gradient to apply.", "Call forward_backward before optim_step."
            )
        max_norm = params.grad_clip_norm if params.grad_clip_norm > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, max_norm))
        if not math.isfinite(norm):
            self._torch.zero_grad(set_to_none=True)
            raise UserInputError(
                f"The gradient's norm is {norm}: no step was taken, the gradient is dropped.",
                "Lower the learning rate, or train on from the last saved state.",
            )
        self._torch.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._torch.step()
        self._torch.zero_grad(set_to_none=True)
        return {"grad_norm": norm}

    def state(self) -> dict[str, list[torch.Tensor]]:
        """`exp_avg`, `exp_avg_sq` (shapes of the parameters) and `step` (scalars), in order.

        Empty lists before the first step.
        """
        entries = [self._torch.state.get(parameter, {}) for parameter in self._parameters]
        names = ("exp_avg", "exp_avg_sq", "step")
        return {name: [entry[name] for entry in entries if name in entry] for name in names}

    def load_state(self, state: Mapping[str, list[torch.Tensor]]) -> None:
        """Continue from what `state` returned."""
        if not state["step"]:
            return
        for index, parameter in enumerate(self._parameters):
            self._torch.state[parameter] = {name: state[name][index] for name in state}


def _check(params: AdamParams) -> None:
    fields = vars(params)
    for name, value in fields.items():
        if not math.isfinite(value) or value < 0:
            raise UserInputError(f"{name} is {value}.", f"Give {name} a finite value, at least 0.")
    for name in ("beta1", "beta2"):
        if fields[name] >= 1:
            raise UserInputError(f"{name} is {fields[name]}.", f"Give {name} a value below 1.")
