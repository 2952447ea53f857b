"""The policy of a step: samples as the cookbook asks for them, and what they cost."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tinker_mcp.runs.policy.tasks import ended
from tinker_mcp.runs.rl_options import CACHED_SHARE, MAX_GROUP_SIZE, SamplingOptions

if TYPE_CHECKING:
    import tinker
    from tinker_cookbook.completers import TokensWithLogprobs

_SEEDS = 2**31


@dataclass
class Usage:
    """Tokens that sampling was billed for.

    Attributes:
        prefill: Of prompts, those that were computed before at their share of the price.
        sampled: Of samples.
        logprobs: Sum over those, nats.
    """

    prefill: float = 0.0
    sampled: int = 0
    logprobs: float = 0.0

    def add(self, other: Usage) -> None:
        """Count another's as well."""
        self.prefill += other.prefill
        self.sampled += other.sampled
        self.logprobs += other.logprobs

    @property
    def entropy(self) -> float:
        """Of the policy as its samples tell it, nats a token; 0 where there are none."""
        return -self.logprobs / self.sampled if self.sampled else 0.0

    def usd(self, options: SamplingOptions) -> float:
        """What it cost."""
        prefill, sample = options.prefill_usd_per_million, options.sample_usd_per_million
        return (self.prefill * (prefill or 0.0) + self.sampled * (sample or 0.0)) / 1e6


@dataclass
class Policy:
    """Samples as the cookbook's `TokenCompleter`, for one group.

    What its members ask in the same moment, as with the first turn of a plain prompt, becomes one
    request. Seeds follow from what is asked, so an equal group gets equal samples.

    Attributes:
        seed: Of the group.
        context: Tokens that the model takes, prompt and answer together.
    """

    client: tinker.SamplingClient
    max_tokens: int
    temperature: float
    seed: int
    context: int
    usage: Usage = field(default_factory=Usage)
    _asked: dict[Any, list[asyncio.Future[TokensWithLogprobs]]] = field(default_factory=dict)
    _requests: set[asyncio.Task[None]] = field(default_factory=set)
    _times: dict[bytes, int] = field(default_factory=dict)

    async def __aenter__(self) -> Policy:
        return self

    async def __aexit__(self, *_: object) -> None:
        await ended(self._requests)

    async def __call__(
        self, model_input: tinker.ModelInput, stop: Any, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        """One sample; an empty one, cut by length, where the prompt leaves no room for it."""
        from tinker_cookbook.completers import TokensWithLogprobs

        room = self.context - model_input.length
        limit = min(self.max_tokens, room, *(() if max_tokens is None else (max_tokens,)))
        if limit <= 0:
            return TokensWithLogprobs([], [], "length")
        answer: asyncio.Future[TokensWithLogprobs] = asyncio.get_running_loop().create_future()
        key = (_content(model_input), repr(stop), limit)
        if key not in self._asked:
            self._asked[key] = []
            send = partial(self._send, key, model_input, stop, limit)
            asyncio.get_running_loop().call_soon(send)  # after the others had their turn
        self._asked[key].append(answer)
        return await answer

    def _send(self, key: Any, prompt: tinker.ModelInput, stop: Any, limit: int) -> None:
        answers = self._asked.pop(key)
        for first in range(0, len(answers), MAX_GROUP_SIZE):
            some = answers[first : first + MAX_GROUP_SIZE]
            request = asyncio.create_task(self._request(prompt, stop, limit, key[0], some))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)

    async def _request(
        self,
        prompt: tinker.ModelInput,
        stop: Any,
        limit: int,
        content: bytes,
        answers: Sequence[asyncio.Future[TokensWithLogprobs]],
    ) -> None:
        import tinker
        from tinker_cookbook.completers import TokensWithLogprobs

        time = self._times[content] = self._times.get(content, 0) + 1
        params = tinker.SamplingParams(
            max_tokens=limit,
            temperature=self.temperature,
            seed=seed_of(self.seed, content, time),
            stop=stop,
        )
        try:
            response = await self.client.sample(prompt, len(answers), params)
        except Exception as error:  # whoever asked gets it
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
            return
        self._count(prompt.length, response)
        for answer, drawn in zip(answers, response.sequences, strict=True):
            if not answer.done():
                sample = TokensWithLogprobs(
                    list(drawn.tokens), list(drawn.logprobs or ()), drawn.stop_reason
                )
                answer.set_result(sample)

    def _count(self, length: int, response: tinker.SampleResponse) -> None:
        known = min(length, response.prompt_cache_hit_tokens)
        repeated = known + (len(response.sequences) - 1) * length
        self.usage.add(
            Usage(
                prefill=length - known + CACHED_SHARE * repeated,
                sampled=sum(len(drawn.tokens) for drawn in response.sequences),
                logprobs=sum(sum(drawn.logprobs or ()) for drawn in response.sequences),
            )
        )


def seed_of(*parts: object) -> int:
    """A seed that follows from its parts, the same in every process."""
    said = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(said[:8], "big") % _SEEDS


def _content(model_input: tinker.ModelInput) -> bytes:
    return hashlib.sha256(model_input.model_dump_json().encode()).digest()
