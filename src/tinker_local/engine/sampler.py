"""Drawing tokens: all sequences that use the same weights advance together, one token at a time.

A request joins whenever it comes and leaves when it is done (continuous batching): a step of 32
sequences takes less than twice as long as a step of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from tinker_local.engine import growing, prompts
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.cache import KeyValueCache, is_shared
from tinker_local.engine.growing import Row
from tinker_local.engine.lora import Adapter
from tinker_local.ops import Sample, SampledSequence, SampleOutput

_CACHE_BYTES = growing.CACHE_BYTES


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


@dataclass(eq=False)
class _Row(Row):
    """A sequence while it grows, and the request that it is of."""

    request: _Request = field(kw_only=True)


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
                new.append(_Row(request.op, number, request=request))
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
        going_on, ended = growing.extend(rows, logits, self._model)
        for row, sequence in ended:
            row.request.done[row.number] = sequence
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
        size = len(request.op.prompt) + growing.most_tokens(request.op, self._model)
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
