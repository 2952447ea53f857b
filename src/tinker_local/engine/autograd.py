"""torch's own autograd functions, with types."""

from __future__ import annotations

from typing import Any, cast

import torch


def applied(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    """What a function with a backward pass of its own makes of `args`, recorded by autograd."""
    apply: Any = function.apply
    return cast("torch.Tensor", apply(*args))
