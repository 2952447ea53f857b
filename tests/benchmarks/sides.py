"""What both sides can do, so that one function measures either; and the pipe to the plain one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.benchmarks.workloads import Batch

RANK = 32
LEARNING_RATE = 1e-4
STOP_BOUND_S = 10.0


@dataclass(frozen=True)
class Setup:
    """What is the same for both sides.

    Attributes:
        dtype: Number format of the base weights, "bfloat16" or "float32".
        has_autocast: Whether the plain loop trains under torch.autocast.
    """

    model_name: str
    model_folder: Path
    dtype: str
    threads: int
    has_autocast: bool


@dataclass(frozen=True)
class Trained:
    """One forward_backward: its duration, and the mean logprob of the targets that count."""

    seconds: float
    mean_logprob: float


class Side(Protocol):
    """A trainer with one LoRA adapter."""

    def forward_backward(self, batch: Batch) -> Trained: ...

    def optim_step(self) -> None: ...

    def sample(self, prompt: Sequence[int], num_samples: int, new_tokens: int) -> float:
        """Draw exactly so many tokens a sequence with the adapter; return seconds."""
        ...

    def peak_memory_bytes(self) -> int | None: ...

    def close(self) -> None: ...


class Plain:
    """The plain loop of `plain.py` in a fresh process."""

    def __init__(self, setup: Setup) -> None:
        training = "autocast" if setup.has_autocast else "default"
        arguments = (str(setup.model_folder), setup.dtype, training)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.plain", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(setup.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def forward_backward(self, batch: Batch) -> Trained:
        groups = [
            [{**vars(example), "counts": example.counts} for example in group]
            for group in batch.groups
        ]
        return Trained(**self._ask("forward_backward", loss_fn=batch.loss_fn, groups=groups))

    def optim_step(self) -> None:
        self._ask("optim_step")

    def sample(self, prompt: Sequence[int], num_samples: int, new_tokens: int) -> float:
        reply = self._ask(
            "sample", prompt=list(prompt), num_samples=num_samples, new_tokens=new_tokens
        )
        assert reply["tokens"] == num_samples * new_tokens
        return float(reply["seconds"])

    def peak_memory_bytes(self) -> int | None:
        found: int | None = self._ask("peak_memory")["bytes"]
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_BOUND_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_BOUND_S)
        self._process.stdout.close()

    def _ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            RuntimeError: The process ended; its own words are on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": operation, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"The plain loop ended before {operation}.") from None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The plain loop ended in {operation}.")
        reply: dict[str, Any] = json.loads(line)
        return reply
