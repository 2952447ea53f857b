"""Drawing tokens from a model that reads images: each request by itself, its sequences together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicCache

from tinker_local.engine import growing, prompts
from tinker_local.engine.growing import CACHE_BYTES, Row
from tinker_local.engine.lora import Adapter
from tinker_local.engine.vision import VisionModel
from tinker_local.ops import NOT_SCORED, Sample, SampledSequence, SampleOutput


@dataclass
class _Request:
    """A Sample under way.

    Attributes:
        rows: Its sequences that grow, in the order of the cache's rows.
        position: Rotary position of their next token.
    """

    op: Sample
    cache: DynamicCache | None = None
    rows: list[Row] = field(default_factory=list)
    position: int = 0
    done: dict[int, SampledSequence] = field(default_factory=dict)
    scores: prompts.PromptScores = prompts.NO_SCORES


class VisionSampler:
    """The sequences that one vision model with one adapter is drawing."""

    def __init__(self, model: VisionModel, adapter: Adapter | None) -> None:
        self._model = model
        self._adapter = adapter
        self._requests: dict[str, _Request] = {}

    @property
    def tickets(self) -> list[str]:
        return list(self._requests)

    @property
    def is_idle(self) -> bool:
        return not self._requests

    def start(self, ticket: str, op: Sample) -> None:
        """Take a checked request on."""
        self._requests[ticket] = _Request(op)

    def stop(self, ticket: str) -> None:
        """Forget a request, wherever it stands."""
        self._requests.pop(ticket, None)

    @torch.inference_mode()
    def step(self) -> Mapping[str, SampleOutput]:
        """Draw one token for every sequence of the requests that fit the cache.

        Returns:
            The requests that are done with it.

        Raises:
            UserInputError: The weights have diverged.
        """
        with self._model.adapted(self._adapter):
            for request in self._fitting():
                if request.cache is None:
                    self._begin(request)
                else:
                    self._advance(request, request.cache)
        done = {t: r for t, r in self._requests.items() if len(r.done) == r.op.num_samples}
        for ticket in done:
            del self._requests[ticket]
        return {ticket: _output(request) for ticket, request in done.items()}

    def _fitting(self) -> list[_Request]:
        """Those that may advance now, first come first served; one always may."""
        fitting: list[_Request] = []
        tokens = 0
        for request in self._requests.values():
            op = request.op
            each = len(op.prompt) + growing.most_tokens(op, self._model)
            tokens += op.num_samples * each
            if fitting and tokens * self._model.cache_bytes_per_token > CACHE_BYTES:
                break
            fitting.append(request)
        return fitting

    def _begin(self, request: _Request) -> None:
        """Read the prompt, and draw the first token of each sequence."""
        op, cache = request.op, self._model.new_cache()
        read = self._model.read(op.prompt, op.images, cache)
        request.scores = self._scores(op, read.hidden)
        request.cache, request.position = cache, read.next_position
        request.rows = [Row(op, number) for number in range(op.num_samples)]
        cache.batch_repeat_interleave(op.num_samples)
        logits = self._model.logits(read.hidden[-1:])  # (1, vocabulary)
        self._extend(request, cache, logits.repeat(op.num_samples, 1))

    def _advance(self, request: _Request, cache: DynamicCache) -> None:
        """Draw the next token of each sequence."""
        last = [row.tokens[-1] for row in request.rows]
        hidden = self._model.read_next(last, request.position, cache)
        request.position += 1
        self._extend(request, cache, self._model.logits(hidden))

    def _extend(self, request: _Request, cache: DynamicCache, logits: torch.Tensor) -> None:
        """Add a token to each row, from logits (R, vocabulary)."""
        going_on, ended = growing.extend(request.rows, logits, self._model)
        request.done |= {row.number: sequence for row, sequence in ended}
        if ended and going_on:
            kept = {row.number for row in going_on}
            places = [place for place, row in enumerate(request.rows) if row.number in kept]
            cache.batch_select_indices(torch.tensor(places, device=self._model.device))
        request.rows = going_on

    def _scores(self, op: Sample, hidden: torch.Tensor) -> prompts.PromptScores:
        """What is asked of the prompt; nothing of an image's tokens, which are no text."""
        scores = prompts.score(op, prompts.Prompt((), hidden, 0), self._model)
        for image in op.images:
            places = slice(image.at, image.at + (image.expected_tokens or 0))
            if scores.logprobs is not None:
                scores.logprobs[places] = float("nan")
            if scores.top is not None:
                scores.top.tokens[places], scores.top.logprobs[places] = 0, NOT_SCORED
        return scores


def _output(request: _Request) -> SampleOutput:
    scores = request.scores
    return SampleOutput(
        sequences=[request.done[number] for number in range(request.op.num_samples)],
        prompt_logprobs=scores.logprobs,
        prompt_top=scores.top,
        prompt_targets=scores.targets,
        prompt_alternatives=scores.alternatives,
        prompt_tokens=len(request.op.prompt),
    )
