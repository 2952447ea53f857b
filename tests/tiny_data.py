"""Small training data for the tiny model, whose tokens are the bytes of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from tinker_local.ops import (
    Engine,
    ForwardBackward,
    ResultT,
    Sample,
    SampleOutput,
    Slices,
    TrainingDatum,
)

if TYPE_CHECKING:
    from tinker import types

TINY = "tinker-local/tiny"
END = 258  # <|im_end|>, the tiny model's end of text


def tokens_of(text: str) -> list[int]:
    return list(text.encode())


def op_datum(text: str, weight: float = 1.0) -> TrainingDatum:
    """A datum for the engine: every byte predicts the next with the same weight."""
    tokens = np.array(tokens_of(text), dtype=np.int64)
    weights = np.full(len(tokens) - 1, weight, dtype=np.float32)
    return TrainingDatum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})


def cross_entropy_op(
    model_id: str, *texts: str, weight: float = 1.0, forward_only: bool = False
) -> ForwardBackward:
    data = [op_datum(text, weight) for text in texts]
    return ForwardBackward(model_id, data, "cross_entropy", forward_only=forward_only)


def sdk_datum(text: str, weights: Sequence[float] | None = None) -> types.Datum:
    """The same for the SDK."""
    from tinker import types

    tokens = tokens_of(text)
    weights = [1.0] * (len(tokens) - 1) if weights is None else list(weights)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def run_slices(slices: Slices[ResultT]) -> ResultT:
    """Do all the work of a generator of slices."""
    while True:
        try:
            next(slices)
        except StopIteration as done:
            return cast("ResultT", done.value)


def sample(engine: Engine, op: Sample, ticket: str = "only") -> SampleOutput:
    """Sample one request to its end; raises what it fails with."""
    engine.start_sample(ticket, op)
    for _ in range(2 * 4096):  # the tiny model's context, with room
        results = engine.continue_samples()
        if ticket in results:
            output = results[ticket]
            if isinstance(output, Exception):
                raise output
            return output
    raise AssertionError(f"{ticket} is still not done")
