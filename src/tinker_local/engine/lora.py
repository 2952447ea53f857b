"""Low-rank adapters that share one base model.

The base model's linear layers are wrapped once. An `Adapter` is a bag of tensors; while it is
active, each wrapped layer adds `scale * B(A(x))` of that adapter to its own output. So any number
of training clients and saved samplers use one copy of the base weights, and switching costs a
loop over the layers (0.1 ms), where `peft` keeps every adapter inside the model.

Names, scale and initial values are those of PEFT (A uniform in +-1/sqrt(fan_in), B zero), so an
adapter's file is a PEFT adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tinker_local.engine.autograd import applied
from tinker_local.ops import LoraSpec

LORA_ALPHA = 32  # scale = alpha / rank, as on the hosted service

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
UNEMBED_MODULES = ("lm_head",)


@dataclass(frozen=True)
class Factors:
    """The two matrices of one layer: A (rank, in_features), B (out_features, rank), float32."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class Adapter:
    """One client's adapter: the factors by the module's dotted path in the base model."""

    spec: LoraSpec
    factors: Mapping[str, Factors]

    @property
    def scale(self) -> float:
        return LORA_ALPHA / self.spec.rank

    def parameters(self) -> list[torch.Tensor]:
        return [matrix for factors in self.factors.values() for matrix in (factors.a, factors.b)]


class LoraLinear(nn.Module):
    """A frozen linear layer plus the low-rank product of whichever adapter is active."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.active: Factors | None = None
        self.scale = 1.0

    @property
    def weight(self) -> torch.Tensor:
        """The base weight: transformers looks at it for shapes and devices."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features) in the base's number format."""
        if torch.is_grad_enabled() and self.active is not None:
            active, base = self.active, self.base
            factors = (active.a, active.b, self.scale)
            return applied(_AdaptedLinear, x, base.weight, base.bias, *factors)
        output: torch.Tensor = self.base(x)
        if self.active is not None:
            low = functional.linear(x, self.active.a.to(x.dtype))  # (..., rank)
            rows, low_rows = output.flatten(0, -2), low.flatten(0, -2)
            rows.addmm_(low_rows, self.active.b.to(x.dtype).t(), alpha=self.scale)
        return output


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T + scale * (x A^T) B^T, and x A^T; all of one dtype."""
    output = functional.linear(x, weight, bias)  # (..., out)
    low = functional.linear(x, a)  # (..., rank)
    output.flatten(0, -2).addmm_(low.flatten(0, -2), b.t(), alpha=scale)
    return output, low


def low_rank_gradients(
    gradient: torch.Tensor, x: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the gradient of `adapted_linear`'s output means for A and B.

    Args:
        gradient: Of the output, (M, out).
        x: The input, (M, in).
        low: x A^T, (M, rank).
        b: B, (out, rank).
        scale: As in the forward pass.

    Returns:
        The gradients of `low` (M, rank), and in float32 of A (rank, in) and B (out, rank).
    """
    low_gradient = (gradient @ b).mul_(scale)
    da = low_gradient.t() @ x
    db = (gradient.t() @ low).mul_(scale)
    return low_gradient, da.float(), db.float()


class _AdaptedLinear(torch.autograd.Function):
    """A linear layer with its low-rank product, and gradients for x, A and B only.

    The products are added within the matrix multiplications. Left to autograd, each sum and each
    scaling is a pass over the activations of its own: 8 % of a training step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        output, low = adapted_linear(x, weight, bias, low_a, low_b, scale)
        ctx.save_for_backward(x, weight, low_a, low_b, low)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight, a, b, low = ctx.saved_tensors
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        low_gradient, da, db = low_rank_gradients(rows, inputs, low.flatten(0, -2), b, ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight).addmm_(low_gradient, a).view_as(x)
        return dx, None, None, da, db, None


def adaptable_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that an adapter may touch, by dotted path, in the model's order."""
    wanted = {*ATTENTION_MODULES, *MLP_MODULES, *UNEMBED_MODULES}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in wanted
    }


def wrap(model: nn.Module) -> dict[str, LoraLinear]:
    """Replace each adaptable layer of `model` by a LoraLinear around it; return them by path."""
    layers = {}
    for path, linear in adaptable_modules(model).items():
        parent, _, child = path.rpartition(".")
        layers[path] = LoraLinear(linear)
        setattr(model.get_submodule(parent), child, layers[path])
    return layers


def new_adapter(layers: Mapping[str, LoraLinear], spec: LoraSpec) -> Adapter:
    """A fresh adapter, which changes nothing yet because every B is zero.

    The same seed gives the same adapter on any machine; without one it is random.
    """
    generator = torch.Generator()
    generator.manual_seed(spec.seed) if spec.seed is not None else generator.seed()
    factors = {}
    for path in _targets(layers, spec):
        base = layers[path].base
        bound = 1 / math.sqrt(base.in_features)
        a = torch.empty(spec.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(base.out_features, spec.rank)
        factors[path] = Factors(_trainable(a, base), _trainable(b, base))
    return Adapter(spec, factors)


@contextmanager
def active(layers: Mapping[str, LoraLinear], adapter: Adapter | None) -> Iterator[None]:
    """Apply `adapter` (None: the base model alone) to every forward pass in this block."""
    try:
        if adapter is not None:
            for path, factors in adapter.factors.items():
                layers[path].active = factors
                layers[path].scale = adapter.scale
        yield
    finally:
        for layer in layers.values():
            layer.active = None


def _targets(layers: Mapping[str, LoraLinear], spec: LoraSpec) -> list[str]:
    wanted = (
        *(ATTENTION_MODULES if spec.train_attn else ()),
        *(MLP_MODULES if spec.train_mlp else ()),
        *(UNEMBED_MODULES if spec.train_unembed else ()),
    )
    return [path for path in layers if path.rpartition(".")[2] in wanted]


def _trainable(matrix: torch.Tensor, base: nn.Linear) -> torch.Tensor:
    return matrix.to(base.weight.device).requires_grad_()
