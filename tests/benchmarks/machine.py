"""What the machine itself does: its matrix multiply, and a process's peak memory."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SIZE = 2048
TRIES = 8


def matmul_flops(dtype: str, threads: int) -> float:
    """FLOP/s of a SIZE^3 matrix multiply in this number format, the best of TRIES."""
    import torch

    torch.set_num_threads(threads)
    left, right = (torch.randn(SIZE, SIZE).to(getattr(torch, dtype)) for _ in range(2))
    fastest = float("inf")
    for _ in range(TRIES + 1):  # the first also allocates
        began = time.perf_counter()
        torch.mm(left, right)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * SIZE**3 / fastest


def peak_memory_bytes(pid: int) -> int | None:
    """The most memory a process ever had resident (VmHWM); None where there is no /proc."""
    if sys.platform != "linux":
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else None


@dataclass(frozen=True)
class Flops:
    """FLOP of one training step, by token.

    A frozen weight costs 2 FLOP in the forward pass and 2 for the gradient of its input: 4 a
    parameter. A LoRA weight costs 2 more for its own gradient: 6. Attention scores, norms and
    whatever is computed twice to save memory do not count.

    Attributes:
        body: All adapted layers but the head.
        head: The head, of `hidden * vocabulary` weights.
    """

    body: float
    head: float

    @property
    def nominal(self) -> float:
        """Of one token for which everything is computed."""
        return self.body + self.head


def training_flops(model_folder: Path, rank: int) -> Flops:
    """Count the weights of a model of our architecture (see SUPPORTED_MODEL_TYPES) from its files.

    The embedding is looked up, not multiplied; where the head is tied to it, it counts as the head.
    """
    shapes = _shapes(model_folder)
    embedding = next(
        shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")
    )
    body = sum(
        _flops(shape, rank)
        for name, shape in shapes.items()
        if name.endswith("_proj.weight") and len(shape) == 2
    )
    return Flops(body=body, head=_flops(shapes.get("lm_head.weight", embedding), rank))


def _flops(shape: tuple[int, ...], rank: int) -> float:
    rows, columns = shape
    return 4 * rows * columns + 6 * rank * (rows + columns)


def _shapes(model_folder: Path) -> Mapping[str, tuple[int, ...]]:
    from safetensors import safe_open

    shapes = {}
    for file in model_folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118  # no mapping, it only has keys()
                shapes[name] = tuple(weights.get_slice(name).get_shape())
    return shapes
