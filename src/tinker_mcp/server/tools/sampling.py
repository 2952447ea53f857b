"""sample."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from tinker_mcp.server.tools.replies import (
    STILL_RUNNING,
    CheckpointPath,
    Seed,
    ToolContext,
    backend_label,
    finite,
    workspace_of,
)
from tinker_mcp.training import sampling
from tinker_mcp.training.sampling import Question, Source

_SHOWN_CHARACTERS = 12_000  # of all samples together: a reply stays under 4k tokens


class SampleText(BaseModel):
    text: str
    is_complete: bool = Field(description="It came to its proper end, not to max_tokens.")
    stop_reason: str
    tokens: int
    mean_logprob: float | None = Field(
        description="Nats a token, under the sampled weights; null if it is not finite."
    )
    is_cut: bool = Field(description="text was shortened for this reply.")


class Samples(BaseModel):
    finished: bool
    samples: list[SampleText]
    weights: str = Field(description="Whose weights these are, and at which step.")
    base_model: str | None
    renderer: str | None
    prompt_tokens: int | None
    backend: str | None
    next_step: str


async def sample(
    ctx: ToolContext,
    client_id: Annotated[
        str | None, Field(description="Sample this training client's current weights.")
    ] = None,
    checkpoint: Annotated[
        CheckpointPath | None, Field(description="Or a saved one, tinker://...")
    ] = None,
    base_model: Annotated[str | None, Field(description="Or an untrained model.")] = None,
    messages: Annotated[
        list[dict[str, Any]] | None,
        Field(
            min_length=1,
            description='Chat: [{"role": "user", "content": "..."}], rendered for the model.',
        ),
    ] = None,
    prompt: Annotated[
        str | None, Field(description="Or plain text to continue, without a chat format.")
    ] = None,
    num_samples: Annotated[int, Field(ge=1, le=16)] = 1,
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 256,
    temperature: Annotated[float, Field(ge=0, description="0 is greedy.")] = 1.0,
    top_k: Annotated[int, Field(ge=-1, description="-1 keeps all.")] = -1,
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
    seed: Annotated[Seed | None, Field(description="Makes it repeatable.")] = None,
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Field(description="Texts that end a sample. Default: the chat's own end."),
    ] = None,
    renderer: Annotated[str | None, Field(description="Default: the recommended one.")] = None,
) -> Samples:
    """Generate text from a training client, a checkpoint or a base model. Changes no weights.

    Spends sampling tokens on the hosted service. Give one of client_id, checkpoint, base_model, and
    one of messages, prompt. Compare base_model with client_id on the same messages at temperature 0
    to see what training changed. Next: train more, or save_checkpoint.
    """
    source = Source(client_id, checkpoint, base_model)
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
            weights=client_id or checkpoint or f"{base_model}, untrained",
            backend=backend_label(ctx),
            base_model=base_model,
            renderer=renderer,
            prompt_tokens=None,
            next_step=STILL_RUNNING.format(tool="sample"),
        )
    return Samples(
        finished=True,
        samples=[_shown(answer, _SHOWN_CHARACTERS // num_samples) for answer in sampled.answers],
        weights=sampled.weights,
        base_model=sampled.base_model,
        renderer=sampled.renderer,
        prompt_tokens=sampled.prompt_tokens,
        backend=sampled.backend,
        next_step=_next(source),
    )


def _shown(answer: sampling.Answer, characters: int) -> SampleText:
    return SampleText(
        text=answer.text[:characters],
        is_complete=answer.is_complete,
        stop_reason=answer.stop_reason,
        tokens=answer.tokens,
        mean_logprob=finite(answer.mean_logprob, 4),
        is_cut=len(answer.text) > characters,
    )


def _next(source: Source) -> str:
    if source.client_id is not None:
        return f'Call save_checkpoint(client_id="{source.client_id}", name=...) or train on.'
    return "Call create_training_client to train, or list_checkpoints."
