"""Reading prompts: their keys and values for what follows, and their scores where asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from tinker_local.engine import batches
from tinker_local.engine.cache import kept_dtype
from tinker_local.engine.next_tokens import LayerState
from tinker_local.engine.packed import PackedSequences
from tinker_local.engine.picking import draw
from tinker_local.ops import NOT_SCORED, Floats, Sample, Tokens, TokenScores

MAX_READ_TOKENS = 1024
"""Tokens of prompts that are read in one forward pass."""

_SCORED_AT_ONCE = 256  # prompt positions whose logits are in memory together


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read.

    Attributes:
        layers: Its keys and values.
        hidden: Last hidden states, (P, H).
        cached_tokens: How many of its tokens another prompt in the same pass had computed.
    """

    layers: Sequence[LayerState]
    hidden: torch.Tensor
    cached_tokens: int


@dataclass(frozen=True)
class PromptScores:
    """What `tinker_local.ops.SampleOutput` says of the prompt."""

    logprobs: Floats | None = None
    top: TokenScores | None = None
    targets: Floats | None = None
    alternatives: TokenScores | None = None


UNREAD = Prompt((), torch.empty(0), 0)
NO_SCORES = PromptScores()


class Scores(Protocol):
    """What makes logits of hidden states, under an adapter."""

    @property
    def device(self) -> torch.device: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores (T, vocabulary) of the next token, float32, from hidden states (T, H)."""


class Forward(Scores, Protocol):
    """A model under an adapter: an `AdaptedDecoder`, or a `BaseModel` while one is active."""

    def hidden_states(self, tokens: torch.Tensor, layout: Any) -> torch.Tensor:
        """Last hidden states (T, H) of token ids (T,) laid out by `layout`."""


class _Reading(PackedSequences):
    """Packed sequences whose keys and values are kept."""

    def __init__(self, prefix: int, lengths: Sequence[int], device: torch.device) -> None:
        super().__init__(prefix, lengths, device)
        self.layers: list[LayerState] = []

    def attend_rows(
        self, layer: int, heads: torch.Tensor, key_heads: int, scale: float
    ) -> torch.Tensor:
        """See `Layout.attend_rows`."""
        keys, values = heads[:, -2 * key_heads :].transpose(0, 1).chunk(2)
        self.layers.append((keys, values))  # (key-value heads, T, D)
        return super().attend_rows(layer, heads, key_heads, scale)


def read(prompts: Sequence[Tokens], model: Forward) -> list[Prompt]:
    """Read prompts together; what several begin with is read once."""
    found: dict[int, Prompt] = {}
    for batch in batches.plan(prompts, MAX_READ_TOKENS):
        found |= _read_batch(batch, prompts, model)
    return [found[index] for index in range(len(prompts))]


def _read_batch(
    batch: batches.Batch, prompts: Sequence[Tokens], model: Forward
) -> dict[int, Prompt]:
    own = [prompts[index][batch.prefix :] for index in batch.members]
    row = np.concatenate([prompts[batch.members[0]][: batch.prefix], *own])
    layout = _Reading(batch.prefix, [len(tokens) for tokens in own], model.device)
    hidden = model.hidden_states(torch.from_numpy(row).to(model.device), layout)  # (T, H)

    dtype = kept_dtype(model.device, hidden.dtype)
    found = {}
    start = batch.prefix
    for place, (index, tokens) in enumerate(zip(batch.members, own, strict=True)):
        part = slice(start, start + len(tokens))
        layers = [
            (
                _joined(k, batch.prefix, part, dim=1).to(dtype),
                _joined(v, batch.prefix, part, dim=1).to(dtype),
            )
            for k, v in layout.layers
        ]
        cached = batch.prefix if place else 0
        found[index] = Prompt(layers, _joined(hidden, batch.prefix, part, dim=0), cached)
        start = part.stop
    return found


def _joined(tensor: torch.Tensor, prefix: int, own: slice, dim: int) -> torch.Tensor:
    """The shared prefix and one sequence's own part, along `dim`."""
    part = tensor.narrow(dim, own.start, own.stop - own.start)
    return torch.cat([tensor.narrow(dim, 0, prefix), part], dim) if prefix else part


def score(op: Sample, prompt: Prompt, model: Scores) -> PromptScores:
    """Everything that `op` asks about its prompt."""
    size = len(op.prompt)
    first = 1 if op.prompt_logprobs_last_n is None else size - op.prompt_logprobs_last_n
    logprobs = np.full(size, math.nan, dtype=np.float32)
    top = _no_scores(size, op.top_prompt)
    targets = None if op.prompt_targets is None else np.zeros(op.prompt_targets.shape, np.float32)
    alternatives = _no_scores(size - 1, op.prompt_alternatives)
    generator = torch.Generator(device=model.device)
    generator.seed() if op.seed is None else generator.manual_seed(op.seed)

    everywhere = targets is not None or op.prompt_alternatives > 0
    wanted = range(1 if everywhere else first, size) if _is_asked(op) else range(0)
    for start in wanted[::_SCORED_AT_ONCE]:
        places = slice(start, min(start + _SCORED_AT_ONCE, size))  # of the tokens scored
        hidden = prompt.hidden[places.start - 1 : places.stop - 1]
        scores = model.logits(hidden).log_softmax(-1)  # (M, vocabulary)
        own = torch.from_numpy(op.prompt[places]).to(model.device).unsqueeze(1)
        logprobs[places] = scores.gather(1, own).squeeze(1).cpu().numpy()
        before = slice(places.start - 1, places.stop - 1)
        if op.top_prompt:
            _store(top, places, *scores.topk(op.top_prompt))
        if targets is not None and op.prompt_targets is not None:
            asked = torch.from_numpy(op.prompt_targets[before]).to(model.device)
            found = scores.gather(1, asked.clamp(min=0)).masked_fill(asked < 0, 0.0)
            targets[before] = found.cpu().numpy()
        if op.prompt_alternatives:
            drawn = _draw(scores, op, generator)
            _store(alternatives, before, scores.gather(1, drawn), drawn)
    logprobs[:first] = math.nan
    top.tokens[:first], top.logprobs[:first] = 0, NOT_SCORED
    return PromptScores(
        logprobs if op.prompt_logprobs else None,
        top if op.top_prompt else None,
        targets,
        alternatives if op.prompt_alternatives else None,
    )


def _is_asked(op: Sample) -> bool:
    return bool(
        op.prompt_logprobs
        or op.top_prompt
        or op.prompt_targets is not None
        or op.prompt_alternatives
    )


def _draw(scores: torch.Tensor, op: Sample, generator: torch.Generator) -> torch.Tensor:
    """`prompt_alternatives` tokens a position, (M, k), at the request's temperature."""
    if op.temperature == 0:
        return scores.argmax(-1, keepdim=True).expand(-1, op.prompt_alternatives)
    heated = (scores / op.temperature).log_softmax(-1)
    return draw(heated, op.prompt_alternatives, generator)


def _no_scores(size: int, count: int) -> TokenScores:
    return TokenScores(
        np.zeros((size, count), np.int64), np.full((size, count), NOT_SCORED, np.float32)
    )


def _store(
    scores: TokenScores, places: slice, logprobs: torch.Tensor, tokens: torch.Tensor
) -> None:
    scores.tokens[places] = tokens.cpu().numpy()
    scores.logprobs[places] = logprobs.cpu().numpy()
