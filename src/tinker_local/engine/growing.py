"""Sequences while they grow: how each gets its next token, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from tinker_local.engine.base_model import LanguageModel
from tinker_local.engine.picking import Choice, Picked, pick
from tinker_local.ops import Sample, SampledSequence, TokenScores

CACHE_BYTES = 2 * 2**30
"""What the keys and values of all sequences may take; further ones wait. One always may."""


@dataclass(eq=False)
class Row:
    """A sequence while it grows: the one of a request with this number."""

    op: Sample
    number: int
    generator: np.random.Generator = field(init=False)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        seed = None if self.op.seed is None else [self.op.seed, self.number]
        self.generator = np.random.default_rng(seed)

    @property
    def choice(self) -> Choice:
        op = self.op
        return Choice(op.temperature, op.top_k, op.top_p, float(self.generator.random()))

    def finished(self, *, is_stopped: bool) -> SampledSequence:
        """What it has become."""
        top = None
        if self.op.top_sampled:
            top = TokenScores(
                np.array([tokens for tokens, _ in self.top], dtype=np.int64),
                np.array([logprobs for _, logprobs in self.top], dtype=np.float32),
            )
        return SampledSequence(
            tokens=np.array(self.tokens, dtype=np.int64),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            is_stopped=is_stopped,
            top=top,
        )


RowT = TypeVar("RowT", bound=Row)


def extend(
    rows: Sequence[RowT], logits: torch.Tensor, model: LanguageModel
) -> tuple[list[RowT], list[tuple[RowT, SampledSequence]]]:
    """Add a token to each row, from logits (R, vocabulary).

    Returns:
        The rows that go on, and those that have ended with what they have become.

    Raises:
        UserInputError: The weights have diverged.
    """
    _note(rows, pick(logits, [row.choice for row in rows]))
    going_on, ended = [], []
    for row in rows:
        is_stopped = ends(row.op, model, row.tokens)
        if is_stopped or len(row.tokens) >= most_tokens(row.op, model):
            ended.append((row, row.finished(is_stopped=is_stopped)))
        else:
            going_on.append(row)
    return going_on, ended


def ends(op: Sample, model: LanguageModel, tokens: list[int]) -> bool:
    """Whether the last of these tokens ends a sequence."""
    stop_tokens = model.end_of_text if op.stop_tokens is None else op.stop_tokens
    if tokens[-1] in stop_tokens:
        return True
    if not op.stop_strings:
        return False
    # A token adds at least one byte, so a stop string of n bytes lies within n + 1 tokens.
    longest = max(len(stop.encode()) for stop in op.stop_strings)
    tail = model.text(tokens[-(longest + 1) :])
    return any(stop in tail for stop in op.stop_strings)


def most_tokens(op: Sample, model: LanguageModel) -> int:
    """How many tokens a sequence may get."""
    room = model.info.max_context_length - len(op.prompt)
    return room if op.max_tokens is None else min(op.max_tokens, room)


def _note(rows: Sequence[Row], picked: Picked) -> None:
    for row, token, logprob in zip(rows, picked.tokens, picked.logprobs, strict=True):
        row.tokens.append(token)
        row.logprobs.append(logprob)
    most = max(row.op.top_sampled for row in rows)
    if most:
        values, tokens = picked.all_logprobs.topk(most)
        for row, *best in zip(rows, tokens.tolist(), values.tolist(), strict=True):
            count = row.op.top_sampled
            row.top.append((best[0][:count], best[1][:count]))
