"""Drawing tokens: all sequences that use the same weights advance together, one token at a time.

A request joins whenever it comes and leaves when it is done (continuous batching): a step of 32
sequences takes less than twice as long as a step of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from tinker_local.engine import prompts
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.cache import KeyValueCache, is_shared
from tinker_local.engine.lora import Adapter
from tinker_local.engine.picking import Choice, Picked, pick
from tinker_local.ops import Sample, SampledSequence, SampleOutput, TokenScores

_CACHE_BYTES = 2 * 2**30
"""What the keys and values of all sequences may take; further ones wait. One always may."""


@dataclass
class _Request:
    """A Sample under way."""

    ticket: str
    op: Sample
    done: dict[int, SampledSequence] = field(default_factory=dict)
    waiting: deque[int] = field(default_factory=deque)  # sequences that have not begun
    prompt: prompts.Prompt = prompts.UNREAD
    scores: prompts.PromptScores = prompts.NO_SCORES
    cached_tokens: int = 0


@dataclass
class _Row:
    """A sequence while it grows."""

    request: _Request
    number: int
    generator: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)

    @property
    def choice(self) -> Choice:
        op = self.request.op
        return Choice(op.temperature, op.top_k, op.top_p, float(self.generator.random()))


class Sampler:
    """The sequences that one base model with one adapter is drawing."""

    def __init__(self, model: BaseModel, adapter: Adapter | None) -> None:
        self._model = model
        self._adapter = adapter
        self._requests: dict[str, _Request] = {}
        self._rows: list[_Row] = []  # in the order of the cache's rows
        self._cache = KeyValueCache()
        decoder = model.decoder
        self._forward: prompts.Forward = decoder.adapted(adapter) if decoder else model

    @property
    def tickets(self) -> list[str]:
        return list(self._requests)

    @property
    def is_idle(self) -> bool:
        return not self._requests

    def start(self, ticket: str, op: Sample) -> None:
        """Take a checked request on."""
        self._requests[ticket] = _Request(ticket, op, waiting=deque(range(op.num_samples)))

    @torch.inference_mode()  # as step: the cache cannot be written otherwise
    def stop(self, ticket: str) -> None:
        """Forget a request, wherever it stands."""
        request = self._requests.pop(ticket, None)
        for row in [row for row in self._rows if row.request is request]:
            self._remove(row)

    @torch.inference_mode()
    def step(self) -> Mapping[str, SampleOutput]:
        """Read the prompts that have come, and draw one token for every sequence.

        Returns:
            The requests that are done with it.

        Raises:
            UserInputError: The weights have diverged.
        """
        with self._active():
            self._admit()
            if self._rows:
                self._advance()
        if not self._rows:
            self._cache = KeyValueCache()  # its memory is another sampler's now
        finished = [r for r in self._requests.values() if len(r.done) == r.op.num_samples]
        return {request.ticket: self._result(request) for request in finished}

    def _active(self) -> AbstractContextManager[None]:
        """In which the forward pass has the adapter."""
        if self._forward is self._model:
            return self._model.adapted(self._adapter)
        return nullcontext()

    def _admit(self) -> None:
        """Begin the sequences that fit the cache."""
        new = self._fitting()
        unread = {
            id(row.request): row.request for row in new if row.request.prompt is prompts.UNREAD
        }
        requests = list(unread.values())
        read = prompts.read([request.op.prompt for request in requests], self._forward)
        for request, prompt in zip(requests, read, strict=True):
            request.prompt = prompt
            request.cached_tokens = prompt.cached_tokens
            request.scores = prompts.score(request.op, prompt, self._forward)
        by_request: dict[str, list[_Row]] = {}
        for row in new:
            by_request.setdefault(row.request.ticket, []).append(row)
        for rows in by_request.values():
            self._begin(rows)

    def _fitting(self) -> list[_Row]:
        """Rows for the sequences that may begin now, first come first served."""
        held = {row.request.ticket: row.request for row in self._rows}
        longest = max((self._own_tokens(request) for request in held.values()), default=0)
        shared = sum(self._shared_tokens(request) for request in held.values())
        new: list[_Row] = []
        for request in self._requests.values():
            if request.waiting and request.ticket not in held:
                shared += self._shared_tokens(request)
            while request.waiting:
                longest = max(longest, self._own_tokens(request))
                count = len(self._rows) + len(new) + 1
                tokens = shared + count * longest
                if count > 1 and tokens * self._model.cache_bytes_per_token > _CACHE_BYTES:
                    return new
                number = request.waiting.popleft()
                seed = None if request.op.seed is None else [request.op.seed, number]
                new.append(_Row(request, number, np.random.default_rng(seed)))
        return new

    def _begin(self, rows: list[_Row]) -> None:
        """Draw the first token of some sequences of one request; those that go on are cached."""
        request = rows[0].request
        logits = self._forward.logits(request.prompt.hidden[-1:])  # (1, vocabulary)
        going_on = self._extend(rows, logits.repeat(len(rows), 1))
        if going_on:
            is_kept_once = self._shared_tokens(request) > 0
            append = self._cache.append_shared if is_kept_once else self._cache.append
            append(request.prompt.layers, len(going_on))
            self._rows += going_on
        if not request.waiting:
            request.prompt = prompts.UNREAD  # its keys and values are in the cache by now

    def _advance(self) -> None:
        """Draw the next token of every row."""
        layout = self._cache.next_tokens(self._model.device)
        last = torch.tensor([row.tokens[-1] for row in self._rows], device=self._model.device)
        hidden = self._forward.hidden_states(last, layout)
        going_on = self._extend(self._rows, self._forward.logits(hidden))
        kept = {id(row) for row in going_on}
        for row in [row for row in self._rows if id(row) not in kept]:
            self._remove(row)

    def _extend(self, rows: list[_Row], logits: torch.Tensor) -> list[_Row]:
        """Add a token to each row, from logits (R, vocabulary); the rows that go on."""
        picked = pick(logits, [row.choice for row in rows])
        _note(rows, picked)
        going_on = []
        for row in rows:
            op = row.request.op
            is_stopped = _ends(op, self._model, row.tokens)
            if is_stopped or len(row.tokens) >= _new_tokens(op, self._model):
                row.request.done[row.number] = _finished(row, is_stopped)
            else:
                going_on.append(row)
        return going_on

    def _remove(self, row: _Row) -> None:
        place = self._rows.index(row)
        for source, target in self._cache.remove(place):
            self._rows[target] = self._rows[source]
        self._rows.pop()

    def _shared_tokens(self, request: _Request) -> int:
        """Tokens that a request's sequences keep together."""
        prompt = len(request.op.prompt)
        return prompt if is_shared(self._model.device, request.op.num_samples, prompt) else 0

    def _own_tokens(self, request: _Request) -> int:
        """Tokens that each of its sequences keeps by itself when it is done, at most."""
        size = len(request.op.prompt) + _new_tokens(request.op, self._model)
        return size - self._shared_tokens(request)

    def _result(self, request: _Request) -> SampleOutput:
        del self._requests[request.ticket]
        scores = request.scores
        return SampleOutput(
            sequences=[request.done[number] for number in range(request.op.num_samples)],
            prompt_logprobs=scores.logprobs,
            prompt_top=scores.top,
            prompt_targets=scores.targets,
            prompt_alternatives=scores.alternatives,
            cached_tokens=request.cached_tokens,
        )


def _note(rows: Sequence[_Row], picked: Picked) -> None:
    for row, token, logprob in zip(rows, picked.tokens, picked.logprobs, strict=True):
        row.tokens.append(token)
        row.logprobs.append(logprob)
    most = max(row.request.op.top_sampled for row in rows)
    if most:
        values, tokens = picked.all_logprobs.topk(most)
        for row, *best in zip(rows, tokens.tolist(), values.tolist(), strict=True):
            count = row.request.op.top_sampled
            row.top.append((best[0][:count], best[1][:count]))


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


def _finished(row: _Row, is_stopped: bool) -> SampledSequence:
    top = None
    if row.request.op.top_sampled:
        top = TokenScores(
            np.array([tokens for tokens, _ in row.top], dtype=np.int64),
            np.array([logprobs for _, logprobs in row.top], dtype=np.float32),
        )
    return SampledSequence(
        tokens=np.array(row.tokens, dtype=np.int64),
        logprobs=np.array(row.logprobs, dtype=np.float32),
        is_stopped=is_stopped,
        top=top,
    )
