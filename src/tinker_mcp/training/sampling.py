"""Sampling: from a client's current weights, a checkpoint or a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import rendering, sdk_errors
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import OpenClient, Workspace, told_about
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True)
class Source:
    """Whose weights to sample; exactly one is set."""

    client_id: str | None = None
    checkpoint: str | None = None
    base_model: str | None = None

    def check(self) -> None:
        """Refuse none or several.

        Raises:
            InvalidInputError: Not exactly one is set.
        """
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            said = " and ".join(given) or "nothing"
            raise InvalidInputError(
                f"sample got {said} to sample from.",
                next_step="Give exactly one of client_id, checkpoint and base_model.",
            )


@dataclass(frozen=True)
class Question:
    """What to continue, and how. `messages` go through the renderer, `prompt` is plain text."""

    messages: Sequence[Mapping[str, Any]] | None
    prompt: str | None
    renderer: str | None
    num_samples: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: Sequence[str] | None


@dataclass(frozen=True)
class Answer:
    """One sample; `mean_logprob` in nats a token."""

    text: str
    stop_reason: str
    tokens: int
    mean_logprob: float
    is_complete: bool


@dataclass(frozen=True)
class Sampled:
    """All samples, and whose they are."""

    answers: list[Answer]
    backend: str
    base_model: str
    renderer: str | None
    weights: str
    prompt_tokens: int


async def sample(workspace: Workspace, source: Source, question: Question) -> Sampled | None:
    """Draw samples; None when it takes longer than a call may (ask again with the same values).

    Raises:
        InvalidInputError: Not exactly one source, or not exactly one of messages and prompt.
    """
    source.check()
    if (question.messages is None) == (question.prompt is None):
        raise InvalidInputError(
            "sample needs either messages or prompt.",
            next_step="Give messages for a chat, or prompt for plain text to continue.",
        )
    deadline = workspace.deadline()
    step = None
    if source.client_id is not None:
        client = await workspace.live_client(source.client_id)
        backend, step = client.backend, client.step
    else:
        backend, _ = await workspace.service()
    key = ("sample", source, step, repr(question))
    return await workspace.unfinished.finish(
        key, lambda: _sample(workspace, backend, source, question), backend, deadline
    )


async def _sample(
    workspace: Workspace, backend: Backend, source: Source, question: Question
) -> Sampled:
    known = workspace.client(source.client_id).base_model if source.client_id else source.base_model
    # What is wrong with the question shows before weights are saved to sample from.
    rendered = await _rendered(backend, known, question) if known else None
    sampler, base_model, weights = await _sampler(workspace, source)
    renderer, prompt, stop = rendered or await _rendered(backend, base_model, question)
    import tinker

    params = tinker.SamplingParams(
        max_tokens=question.max_tokens,
        temperature=question.temperature,
        top_k=question.top_k,
        top_p=question.top_p,
        seed=question.seed,
        stop=stop,
    )
    with sdk_errors.told():
        response = await sampler.sample(prompt, question.num_samples, params)
    return Sampled(
        answers=[_answer(sequence, question, renderer) for sequence in response.sequences],
        backend=backend.label,
        base_model=base_model,
        renderer=renderer.name if question.messages is not None else None,
        weights=weights,
        prompt_tokens=prompt.length,
    )


async def _sampler(workspace: Workspace, source: Source) -> tuple[tinker.SamplingClient, str, str]:
    """Sampling client, base model, and a phrase that says whose weights they are."""
    if source.client_id is not None:
        client = workspace.client(source.client_id)
        step, sampler = await _current_sampler(client)
        weights = f"{client.client_id} at step {step}"
        return sampler, client.base_model, weights
    _, service = await workspace.service()
    with sdk_errors.told():
        pending = await anyio.to_thread.run_sync(
            lambda: service.create_sampling_client(
                model_path=source.checkpoint, base_model=source.base_model
            )
        )
        sampler = await pending
        base_model = str(sampler.get_base_model())
    return sampler, base_model, source.checkpoint or f"{source.base_model}, untrained"


async def _current_sampler(client: OpenClient) -> tuple[int, tinker.SamplingClient]:
    """A sampling client of the weights after all steps submitted so far.

    A sampling client keeps the weights it was made from, so a new one is made after each step.
    """
    if client.sampler is None or client.sampler[0] != client.step:
        step = client.step
        with told_about(client):
            sampler = await client.tinker_client.save_weights_and_get_sampling_client()
        client.sampler = (step, sampler)
    return client.sampler


async def _rendered(
    backend: Backend, base_model: str, question: Question
) -> tuple[ModelRenderer, tinker.ModelInput, Any]:
    """Renderer, prompt and stops of a question to this model."""
    renderer = await anyio.to_thread.run_sync(
        rendering.load, backend, base_model, question.renderer
    )
    return renderer, *_prompt(question, renderer)


def _prompt(question: Question, renderer: ModelRenderer) -> tuple[tinker.ModelInput, Any]:
    import tinker

    stop = list(question.stop) if question.stop is not None else None
    if question.prompt is not None:
        tokens = renderer.encode(question.prompt)
        if not tokens:
            raise InvalidInputError("prompt is empty.", next_step="Give some text to continue.")
        return tinker.ModelInput.from_ints(tokens), stop
    try:
        prompt = renderer.prompt(question.messages or ())  # type: ignore[arg-type]  # the renderer checks
    except Exception as error:  # a renderer refuses with assertions as well as with RendererError
        raise InvalidInputError(
            f"The renderer {renderer.name} refuses these messages: {error!r}"[:400],
            next_step='Give a list of {"role", "content"} that ends with a user message.',
        ) from error
    return prompt, stop or renderer.stop()


def _answer(sequence: Any, question: Question, renderer: ModelRenderer) -> Answer:
    if question.messages is not None:
        text, is_complete = renderer.answer(sequence.tokens)
    else:
        text, is_complete = renderer.plain_text(sequence.tokens), sequence.stop_reason == "stop"
    logprobs = sequence.logprobs or [0.0]
    return Answer(
        text=text,
        stop_reason=sequence.stop_reason,
        tokens=len(sequence.tokens),
        mean_logprob=sum(logprobs) / len(logprobs),
        is_complete=is_complete,
    )
