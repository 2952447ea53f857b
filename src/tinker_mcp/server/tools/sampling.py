"""sample and compute_logprobs."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from anyio.to_thread import run_sync
from pydantic import BaseModel, Field

from tinker_mcp.server.tools import run_reading
from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    CheckpointPath,
    Number,
    Seed,
    ToolContext,
    Whole,
    backend_label,
    finite,
    workspace_of,
)
from tinker_mcp.server.tools.run_reading import RunWeights
from tinker_mcp.training import logprobs, sampling
from tinker_mcp.training.logprobs import Scoring, TextLogprobs
from tinker_mcp.training.samplers import Source
from tinker_mcp.training.sampling import Question

_SHOWN_CHARACTERS = 9_000  # of all samples together: a reply stays under 4k tokens
_TOKENS_SHOWN = 60

SampledClient = Annotated[str | None, Field(description="Its current weights.")]
SampledCheckpoint = Annotated[CheckpointPath | None, Field(description="Or saved ones.")]
SampledBase = Annotated[str | None, Field(description="Or an untrained model.")]
Messages = Annotated[
    list[dict[str, Any]] | None,
    Field(min_length=1, description='[{"role": "user", "content": "..."}]'),
]


class SampleText(BaseModel):
    index: int
    text: str
    message: dict[str, Any] | None = Field(
        default=None, description="Only where it says more than text: tool calls, thinking."
    )
    is_complete: bool = Field(description="It came to its proper end, not to max_tokens.")
    stop_reason: str
    tokens: int
    mean_logprob: float | None
    is_cut: bool = Field(description="Shortened for this reply.")


class Samples(BaseModel):
    finished: bool
    group_id: str | None = Field(
        default=None, description="Of several samples; their tokens are kept under it."
    )
    samples: list[SampleText]
    weights: str = Field(description="Whose, and at which step.")
    base_model: str | None
    renderer: str | None
    prompt_tokens: int | None
    backend: str | None
    next_step: str


class ScoredToken(BaseModel):
    position: int
    text: str
    logprob: float | None


class Logprobs(BaseModel):
    finished: bool
    tokens: int | None = None
    sum: float | None = Field(default=None, description="Nats.")
    mean: float | None = None
    perplexity: float | None = None
    least_likely: list[ScoredToken]
    weights: str
    renderer: str | None
    backend: str | None
    next_step: str


async def sample(
    ctx: ToolContext,
    client_id: SampledClient = None,
    checkpoint: SampledCheckpoint = None,
    base_model: SampledBase = None,
    run_id: Annotated[str | None, Field(description="Or a run's newest.")] = None,
    messages: Messages = None,
    prompt: Annotated[str | None, Field(description="Or plain text to continue.")] = None,
    num_samples: Annotated[Whole, Field(ge=1, le=16)] = 1,
    max_tokens: Annotated[Whole, Field(ge=1, le=4096)] = 256,
    temperature: Annotated[Number, Field(ge=0, le=100, description="0: greedy.")] = 1.0,
    top_k: Annotated[Whole, Field(ge=-1, description="-1 keeps all.")] = -1,
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0,
    seed: Seed | None = None,
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Field(description="Default: the chat's own end."),
    ] = None,
    renderer: str | None = None,
) -> Samples:
    """Generate text from a training client, a checkpoint or a base model. Changes no weights.

    Spends sampling tokens; give one source, and one of messages and prompt. Several samples become
    a group: reward them and call build_datums(kind="policy_gradient").
    """
    newest = None if run_id is None else await _newest(ctx, run_id)
    weights_of_run = None if newest is None else newest.sampler_path
    source = Source(client_id, checkpoint, base_model, run_id, weights_of_run)
    question = Question(
        messages,
        prompt,
        renderer,
        num_samples,
        max_tokens,
        temperature,
        top_k or -1,
        top_p,
        seed,
        stop,
    )
    sampled = await sampling.sample(workspace_of(ctx), source, question)
    if sampled is None:
        return Samples(
            finished=False,
            samples=[],
            weights=newest.told if newest else _weights(source),
            backend=backend_label(ctx),
            base_model=base_model,
            renderer=renderer,
            prompt_tokens=None,
            next_step=STILL_RUNNING.format(tool="sample"),
        )
    room = _SHOWN_CHARACTERS // num_samples
    return Samples(
        finished=True,
        group_id=sampled.group_id,
        samples=[_shown(index, answer, room) for index, answer in enumerate(sampled.answers)],
        weights=newest.told if newest else sampled.weights,
        base_model=sampled.base_model,
        renderer=sampled.renderer,
        prompt_tokens=sampled.prompt_tokens,
        backend=sampled.backend,
        next_step=_next(source, sampled.group_id),
    )


async def compute_logprobs(
    ctx: ToolContext,
    client_id: SampledClient = None,
    checkpoint: SampledCheckpoint = None,
    base_model: SampledBase = None,
    text: Annotated[str | None, Field(min_length=1)] = None,
    messages: Messages = None,
    completion: Annotated[
        str | None, Field(min_length=1, description="What follows; then only it is scored.")
    ] = None,
    renderer: str | None = None,
) -> Logprobs:
    """Score a given text: log-probabilities under a client, checkpoint or base model.

    Changes no weights; spends prefill tokens. Of messages only the assistant's tokens count.
    """
    source = Source(client_id, checkpoint, base_model)
    scoring = Scoring(text, messages, completion, renderer)
    found = await logprobs.compute(workspace_of(ctx), source, scoring)
    if found is None:
        return Logprobs(
            finished=False,
            least_likely=[],
            weights=_weights(source),
            renderer=renderer,
            backend=backend_label(ctx),
            next_step=STILL_RUNNING.format(tool="compute_logprobs"),
        )
    return _scored(found, source)


def _scored(found: TextLogprobs, source: Source) -> Logprobs:
    values = [token.logprob for token in found.tokens]
    mean = math.fsum(values) / len(values)
    shown = sorted(found.tokens, key=lambda token: token.logprob)[:_TOKENS_SHOWN]
    return Logprobs(
        finished=True,
        tokens=len(values),
        sum=finite(math.fsum(values)),
        mean=finite(mean),
        perplexity=finite(math.exp(min(-mean, 700.0))),
        least_likely=[
            ScoredToken(
                position=token.position, text=token.text[:40], logprob=finite(token.logprob, 4)
            )
            for token in shown
        ],
        weights=found.weights,
        renderer=found.renderer,
        backend=found.backend,
        next_step=_next(source, None),
    )


async def _newest(ctx: ToolContext, run_id: str) -> RunWeights:
    settings = workspace_of(ctx).connector.settings
    return await run_sync(run_reading.newest_weights, settings, run_id)


def _weights(source: Source) -> str:
    return source.client_id or source.checkpoint or f"{source.base_model}, untrained"


def _shown(index: int, answer: sampling.Answer, characters: int) -> SampleText:
    fits = answer.message is None or len(json.dumps(answer.message)) <= characters
    return SampleText(
        index=index,
        text=answer.text[:characters],
        message=dict(answer.message) if answer.message is not None and fits else None,
        is_complete=answer.is_complete,
        stop_reason=answer.stop_reason,
        tokens=answer.tokens,
        mean_logprob=finite(answer.mean_logprob, 4),
        is_cut=len(answer.text) > characters or not fits,
    )


def _next(source: Source, group_id: str | None) -> str:
    if group_id is not None and source.client_id is not None:
        return (
            f'Score them, then call build_datums(kind="policy_gradient") with "{group_id}" and one '
            "reward a sample, in order."
        )
    if source.client_id is not None:
        return f'Call save_checkpoint(client_id="{source.client_id}", name=...) or train on.'
    if source.run_id is not None:
        return f'Call get_run(run_id="{source.run_id}"), or sample the base_model to compare.'
    return "Call create_training_client to train, or list_checkpoints."
