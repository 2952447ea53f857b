"""From logits to the next token of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tinker_local.errors import UserInputError

_BELOW_ONE = 1 - 2**-22  # nearer to 1, its product with a float32 sum could be the sum itself

_BLOCK = 256  # tokens


@dataclass(frozen=True)
class Choice:
    """How one row chooses.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; -1 keeps all.
        top_p: Keep the smallest set of tokens with this probability mass; 1 keeps all.
        number: Random, in [0, 1): where in the kept probability mass the choice falls.
    """

    temperature: float
    top_k: int
    top_p: float
    number: float

    @property
    def is_cut(self) -> bool:
        return self.temperature > 0 and (self.top_k != -1 or self.top_p < 1)


@dataclass(frozen=True)
class Picked:
    """What `pick` found.

    Attributes:
        tokens: One a row.
        logprobs: Theirs.
        logits: What they were picked from, divided by the temperature, (R, vocabulary).
    """

    tokens: list[int]
    logprobs: list[float]
    logits: torch.Tensor

    @property
    def all_logprobs(self) -> torch.Tensor:
        """Those of every token, (R, vocabulary)."""
        return self.logits.log_softmax(-1)


def pick(logits: torch.Tensor, choices: Sequence[Choice]) -> Picked:
    """Choose the next token of each row from logits (R, vocabulary), float32, overwritten.

    Log-probabilities are those of softmax(logits / temperature), at temperature 0 of
    softmax(logits), before top_k and top_p.

    Raises:
        UserInputError: The weights have diverged, so that the logits are not finite.
    """
    device = logits.device
    if any(choice.temperature not in (0.0, 1.0) for choice in choices):
        scales = torch.tensor([choice.temperature or 1.0 for choice in choices], device=device)
        logits /= scales.unsqueeze(1)
    probabilities = logits.softmax(-1)
    tokens = _drawn(probabilities, choices)
    if any(choice.temperature == 0 for choice in choices):
        is_greedy = torch.tensor([choice.temperature == 0 for choice in choices], device=device)
        tokens = torch.where(is_greedy, logits.argmax(-1), tokens)
    chosen = probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return Picked(tokens.tolist(), chosen.log().tolist(), logits)


def draw(logprobs: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens (M, count), drawn with replacement from log-probabilities (M, vocabulary)."""
    return torch.multinomial(logprobs.exp(), count, replacement=True, generator=generator)


def _drawn(probabilities: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """The token at which the cumulated probability passes each row's number, (R,)."""
    kept = probabilities
    if any(choice.is_cut for choice in choices):
        kept = probabilities.clone()
        for row, choice in enumerate(choices):
            if choice.is_cut:
                kept[row] = _truncated(kept[row], choice.top_k, choice.top_p)
    # Sums of blocks first, then within one: vectorised, a tenth of the time of one long cumsum.
    blocks = kept.view(len(kept), -1, math.gcd(kept.shape[1], _BLOCK))  # (R, blocks, tokens)
    cumulated = blocks.sum(-1).cumsum(-1)
    total = cumulated[:, -1:]
    if not torch.isfinite(total).all():
        raise UserInputError(
            "The logits are not finite: these weights have diverged.",
            "Sample an earlier checkpoint, or train on from one with a lower learning rate.",
        )
    numbers = torch.tensor([[choice.number] for choice in choices], device=kept.device)
    block, beyond = _passed(cumulated, numbers * total)
    rows = torch.arange(len(kept), device=kept.device)
    token, _ = _passed(blocks[rows, block].cumsum(-1), beyond)
    return block * blocks.shape[2] + token


def _passed(cumulated: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The place in each row of sums (R, M) that passes `wanted` (R, 1), (R,), and by how much
    `wanted` is beyond the place before, (R, 1). A place that adds nothing is never it.
    """
    wanted = torch.minimum(wanted, cumulated[:, -1:] * _BELOW_ONE)
    places = torch.searchsorted(cumulated, wanted, right=True)  # (R, 1)
    before = cumulated.gather(1, (places - 1).clamp(min=0)).masked_fill(places == 0, 0.0)
    return places.squeeze(1), wanted - before


def _truncated(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Zero what top_k and top_p leave out of probabilities (vocabulary,); not renormalised."""
    kept = len(probabilities) if top_k == -1 else min(top_k, len(probabilities))
    ranked, order = probabilities.topk(kept) if top_p == 1 else probabilities.sort(descending=True)
    ranked, order = ranked[:kept], order[:kept]
    if top_p < 1:
        before = ranked.cumsum(0) - ranked  # mass of the likelier tokens
        ranked = ranked.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(0, order, ranked)
