"""Drawing tokens: one prompt is read once, then all its samples advance together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache

from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.losses import target_logprobs
from tinker_local.errors import CancelledError, UserInputError
from tinker_local.ops import Floats, Sample, SampledSequence, SampleOutput

_SCORED_AT_ONCE = 256  # prompt positions whose logits are in memory together


@dataclass
class _Growing:
    """A continuation while it grows."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_stopped: bool = False


def check(op: Sample, model: BaseModel) -> None:
    """Refuse a request that cannot work.

    Raises:
        UserInputError: The first argument out of range, with its value.
    """
    limit = model.info.max_context_length
    length = len(op.prompt)
    if not 0 < length < limit:
        raise UserInputError(
            f"The prompt has {length} tokens; {model.info.name} takes 1 to {limit - 1}.",
            "Shorten the prompt.",
        )
    outside = op.prompt[(op.prompt < 0) | (op.prompt >= model.vocabulary)]
    rules = (
        (outside.size == 0, f"token ids {outside[:3].tolist()}", f"below {model.vocabulary}"),
        (1 <= op.num_samples <= 128, f"num_samples {op.num_samples}", "1 to 128"),
        (op.max_tokens is None or op.max_tokens > 0, f"max_tokens {op.max_tokens}", "at least 1"),
        (0 <= op.temperature < math.inf, f"temperature {op.temperature}", "0 or more"),
        (op.top_k == -1 or op.top_k > 0, f"top_k {op.top_k}", "-1 or at least 1"),
        (0 < op.top_p <= 1, f"top_p {op.top_p}", "above 0, at most 1"),
        (all(op.stop_strings), f"stop strings {list(op.stop_strings)}", "no empty ones"),
    )
    for is_valid, value, allowed in rules:
        if not is_valid:
            raise UserInputError(f"{value}: out of range.", f"Allowed: {allowed}.")


@torch.inference_mode()
def run(op: Sample, model: BaseModel, is_cancelled: Callable[[], bool]) -> SampleOutput:
    """Draw `op.num_samples` continuations; the adapter to use must be active.

    Raises:
        CancelledError: `is_cancelled` turned true between two tokens.
    """
    prompt = torch.from_numpy(op.prompt).to(model.device)
    cache = DynamicCache()
    hidden = model.extend(prompt.unsqueeze(0), cache)[0]  # (P, H)
    prompt_logprobs = _score_prompt(hidden, prompt, model) if op.prompt_logprobs else None

    cache.batch_repeat_interleave(op.num_samples)
    logits = model.logits(hidden[-1:]).expand(op.num_samples, -1)  # (S, vocabulary)
    sequences = _draw(op, model, logits, cache, is_cancelled)
    return SampleOutput([_finished(sequence) for sequence in sequences], prompt_logprobs)


def _draw(
    op: Sample,
    model: BaseModel,
    logits: torch.Tensor,
    cache: DynamicCache,
    is_cancelled: Callable[[], bool],
) -> Sequence[_Growing]:
    generator = torch.Generator(device=model.device)
    generator.manual_seed(op.seed) if op.seed is not None else generator.seed()
    sequences = [_Growing() for _ in range(op.num_samples)]
    rows = list(range(op.num_samples))  # which sequence each row of the batch belongs to
    for remaining in range(_new_tokens(op, model), 0, -1):
        if is_cancelled():
            raise CancelledError("The sample was cancelled.", "Send it again if still wanted.")
        tokens, logprobs = _pick(op, logits, generator)  # both (rows,)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            sequences[row].tokens.append(token)
            sequences[row].logprobs.append(logprob)
            sequences[row].is_stopped = _ends(op, model, sequences[row].tokens)
        keep = [place for place, row in enumerate(rows) if not sequences[row].is_stopped]
        if not keep or remaining == 1:
            break
        if len(keep) < len(rows):
            rows = [rows[place] for place in keep]
            kept = torch.tensor(keep, device=model.device)
            cache.batch_select_indices(kept)
            tokens = tokens[kept]
        logits = model.logits(model.extend(tokens.unsqueeze(1), cache)[:, -1])
    return sequences


def _pick(
    op: Sample, logits: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token of each row, (S,), and its log-probability, (S,), from logits (S, vocabulary).

    Raises:
        UserInputError: The weights have diverged, so that the logits are not finite.
    """
    if not torch.isfinite(logits).all():
        raise UserInputError(
            "The logits are not finite: these weights have diverged.",
            "Sample an earlier checkpoint, or train on from one with a lower learning rate.",
        )
    if op.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, target_logprobs(logits, tokens)
    scaled = logits / op.temperature
    probabilities = _truncate(scaled.softmax(-1), op.top_k, op.top_p)
    tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return tokens, target_logprobs(scaled, tokens)


def _truncate(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Zero what top_k and top_p leave out of probabilities (S, vocabulary); not renormalised."""
    if top_k == -1 and top_p == 1:
        return probabilities
    ranked, order = probabilities.sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked  # mass of the likelier tokens
    ranked = ranked.masked_fill(before >= top_p, 0.0)
    if top_k != -1:
        ranked[:, top_k:] = 0.0
    return torch.zeros_like(probabilities).scatter_(-1, order, ranked)


def _ends(op: Sample, model: BaseModel, tokens: list[int]) -> bool:
    stop_tokens = model.end_of_text if op.stop_tokens is None else op.stop_tokens
    if tokens[-1] in stop_tokens:
        return True
    if not op.stop_strings:
        return False
    # A token adds at least one byte, so a stop string of n bytes lies within n + 1 tokens.
    longest = max(len(stop.encode()) for stop in op.stop_strings)
    tail = model.text(tokens[-(longest + 1) :])
    return any(stop in tail for stop in op.stop_strings)


def _new_tokens(op: Sample, model: BaseModel) -> int:
    room = model.info.max_context_length - len(op.prompt)
    return room if op.max_tokens is None else min(op.max_tokens, room)


def _score_prompt(hidden: torch.Tensor, prompt: torch.Tensor, model: BaseModel) -> Floats:
    """Log-probability of each prompt token given those before it, (P,) with NaN at 0."""
    scores = [
        target_logprobs(model.logits(some_hidden), some_targets)
        for some_hidden, some_targets in zip(
            torch.split(hidden[:-1], _SCORED_AT_ONCE),
            torch.split(prompt[1:], _SCORED_AT_ONCE),
            strict=True,
        )
    ]
    nothing_before = torch.full((1,), math.nan, device=hidden.device)
    return torch.cat([nothing_before, *scores]).cpu().numpy()


def _finished(sequence: _Growing) -> SampledSequence:
    return SampledSequence(
        tokens=np.array(sequence.tokens, dtype=np.int64),
        logprobs=np.array(sequence.logprobs, dtype=np.float32),
        is_stopped=sequence.is_stopped,
    )
