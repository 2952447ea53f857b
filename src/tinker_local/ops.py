"""The operations of a Tinker backend and their results, as plain frozen data.

This is all that `service` (HTTP) and `engine` (PyTorch) know of each other. Arrays are numpy:
tokens int64, everything else float32.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]

ResultT = TypeVar("ResultT")
Slices: TypeAlias = Generator[None, None, ResultT]
"""Work that pauses now and then, so that other work can be done, and returns its result."""


@dataclass(frozen=True)
class LoraSpec:
    """Which modules a training client adapts, and how. Defaults are those of the SDK."""

    rank: int = 32
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True


@dataclass(frozen=True)
class Image:
    """An image that stands among tokens.

    Attributes:
        at: How many tokens come before it.
        data: The file's bytes.
        format: "png" or "jpeg".
        expected_tokens: How many tokens the client takes it for; None leaves that to the model.
    """

    at: int
    data: bytes = field(repr=False)
    format: str = "png"
    expected_tokens: int | None = None


@dataclass(frozen=True)
class TrainingDatum:
    """One training example, already shifted by the client.

    Attributes:
        tokens: Model input, shape (N,); of the text alone, if there are images.
        loss_fn_inputs: Arrays by name; `target_tokens` is int64 (N,), the others float32 (N,), N
            with the images' tokens.
        images: In their order.
    """

    tokens: Tokens
    loss_fn_inputs: Mapping[str, NDArray[np.generic]]
    images: Sequence[Image] = ()


@dataclass(frozen=True)
class ForwardBackward:
    """Gradients of one loss over a batch, added to those already accumulated."""

    model_id: str
    data: Sequence[TrainingDatum]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False


@dataclass(frozen=True)
class LossOutput:
    """Result of a ForwardBackward.

    Attributes:
        logprobs: Per datum, log p(target token) in nats, shape (N,).
        metrics: Keys end in the suffix that tells the SDK how to merge chunks, `loss:sum`.
    """

    logprobs: Sequence[Floats]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class AdamParams:
    """One AdamW step. Defaults are those of `tinker.AdamParams` 0.38; 0.0 clips nothing."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class BaseWeights:
    """Sample from the base model as it is."""

    base_model: str


@dataclass(frozen=True)
class SavedWeights:
    """Sample from the adapter saved in a folder."""

    base_model: str
    folder: Path


SamplerWeights: TypeAlias = BaseWeights | SavedWeights


@dataclass(frozen=True)
class Sample:
    """Draw continuations of one prompt, and score the prompt where asked.

    Attributes:
        prompt: Token ids, shape (P,); of the text alone, if there are images.
        max_tokens: At most so many new tokens; None means up to the context's end.
        stop_tokens: A sequence ends with the first of these ids; the id stays in the result.
            None means the model's own end-of-text ids.
        stop_strings: A sequence ends with the token that completes one of these.
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; -1 keeps all.
        top_p: Keep the smallest set of tokens with this probability mass; 1 keeps all.
        seed: The same seed draws the same numbers; each sequence has its own.
        top_sampled: How many of the likeliest tokens to report beside each new token.
        prompt_logprobs: Whether to score the prompt's tokens.
        prompt_logprobs_last_n: Score only so many of its last tokens; None scores all.
        top_prompt: How many of the likeliest tokens to report at each scored prompt token.
        prompt_targets: Token ids to score at prompt positions 1 to P-1, shape (P-1, K), -1 where
            nothing is asked.
        prompt_alternatives: How many tokens to draw, at `temperature`, at each of these positions.
        images: Those of the prompt, in their order.
    """

    weights: SamplerWeights
    prompt: Tokens
    num_samples: int = 1
    max_tokens: int | None = None
    stop_tokens: Sequence[int] | None = None
    stop_strings: Sequence[str] = ()
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    top_sampled: int = 0
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    top_prompt: int = 0
    prompt_targets: Tokens | None = None
    prompt_alternatives: int = 0
    images: Sequence[Image] = ()


@dataclass(frozen=True)
class TokenScores:
    """Several tokens at each of M positions, with their log-probabilities; both (M, k).

    Where nothing was scored, the token is 0 and the log-probability `NOT_SCORED`.
    """

    tokens: Tokens
    logprobs: Floats


NOT_SCORED = -99999.0
"""What `tinker.types.TopkLogprobs` holds at an empty place."""


@dataclass(frozen=True)
class SampledSequence:
    """One continuation.

    Attributes:
        tokens: New tokens, shape (T,), the stop token included.
        logprobs: Log-probability of each under softmax(logits / temperature), before top_k and
            top_p cut it (at temperature 0: under softmax(logits)), shape (T,).
        is_stopped: True where a stop token or string ended it, False where the length did.
        top: The likeliest tokens at each place, (T, k), best first, by the same distribution.
    """

    tokens: Tokens
    logprobs: Floats
    is_stopped: bool
    top: TokenScores | None = None


@dataclass(frozen=True)
class SampleOutput:
    """Result of a Sample; all that concerns the prompt is at temperature 1.

    Attributes:
        sequences: The continuations.
        prompt_logprobs: (P,), NaN where not scored, as at 0 and at an image's tokens.
        prompt_top: (P, k), best first.
        prompt_targets: Log-probabilities in the shape of `Sample.prompt_targets`, 0 for -1.
        prompt_alternatives: (P-1, k), drawn with replacement.
        cached_tokens: How many of the prompt's tokens another prompt had already computed.
        prompt_tokens: Length of a prompt with images; None of one of text, which is known.
    """

    sequences: Sequence[SampledSequence]
    prompt_logprobs: Floats | None = None
    prompt_top: TokenScores | None = None
    prompt_targets: Floats | None = None
    prompt_alternatives: TokenScores | None = None
    cached_tokens: int = 0
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class BaseModelInfo:
    """A base model that the engine serves."""

    name: str
    folder: Path
    max_context_length: int


class Engine(Protocol):
    """What the service asks of a backend. Called from one thread, one call at a time.

    Between two slices of one call any other may come, if it concerns another model.

    A method raises `errors.UserInputError` for a request that can never work and
    `errors.NotFoundError` for a model that is not here; anything else is the engine's own fault.
    """

    def base_models(self) -> Sequence[BaseModelInfo]: ...

    def create_model(self, model_id: str, base_model: str, lora: LoraSpec) -> None: ...

    def load_model(self, model_id: str, base_model: str, folder: Path, *, optimizer: bool) -> None:
        """Create a model from a saved state, with or without its optimizer's moments."""

    def drop_model(self, model_id: str) -> None: ...

    def forward_backward(self, op: ForwardBackward) -> Slices[LossOutput]:
        """Gradients, in slices of about a second; closing it early leaves nothing behind."""

    def drop_gradient(self, model_id: str) -> None:
        """Forget what forward_backward has accumulated since the last optim_step."""

    def optim_step(self, model_id: str, params: AdamParams) -> Mapping[str, float]: ...

    def save_state(self, model_id: str, folder: Path) -> None:
        """Write adapter and optimizer into an existing, empty folder."""

    def save_sampler(self, model_id: str, folder: Path) -> None:
        """Write the adapter alone into an existing, empty folder."""

    def start_sample(self, ticket: str, op: Sample) -> None:
        """Take a request on; `continue_samples` returns its result under `ticket`."""

    def continue_samples(self) -> Mapping[str, SampleOutput | Exception]:
        """One token more for every sequence under way; the requests that this has finished."""

    def stop_sample(self, ticket: str) -> None:
        """Forget a request; nothing happens if it is finished."""
