"""Sampling: from a client's current weights, a checkpoint or a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.groups import Group, SampledSequence, keep
from tinker_mcp.training.messages import message_problem
from tinker_mcp.training.rendering import ModelRenderer
from tinker_mcp.training.samplers import Sampler, Source, ask

if TYPE_CHECKING:
    import tinker
    from tinker_cookbook.renderers import Message


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
    """One sample; `mean_logprob` in nats a token.

    Attributes:
        message: Its parts as the renderer parsed them, where they say more than the text.
    """

    text: str
    stop_reason: str
    tokens: int
    mean_logprob: float
    is_complete: bool
    message: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Sampled:
    """All samples, and whose they are; several are a group, kept under its handle."""

    answers: list[Answer]
    backend: str
    base_model: str
    renderer: str | None
    weights: str
    prompt_tokens: int
    group_id: str | None


async def sample(workspace: Workspace, source: Source, question: Question) -> Sampled | None:
    """Draw samples; None when it takes longer than a call may (ask again with the same values).

    Raises:
        InvalidInputError: Not exactly one source, or not exactly one of messages and prompt.
    """
    source.check("sample")
    if (question.messages is None) == (question.prompt is None):
        raise InvalidInputError(
            "sample needs either messages or prompt.",
            next_step="Give messages for a chat, or prompt for plain text to continue.",
        )

    async def use(
        sampler: Sampler, renderer: ModelRenderer, rendered: tuple[tinker.ModelInput, Any]
    ) -> Sampled:
        prompt, stop = rendered
        response = await sampler.client.sample(
            prompt, question.num_samples, _params(question, stop)
        )
        group = _kept(
            workspace, sampler, renderer, prompt, response.sequences, question.temperature
        )
        return Sampled(
            answers=[_answer(sequence, question, renderer) for sequence in response.sequences],
            backend=sampler.backend.label,
            base_model=sampler.base_model,
            renderer=renderer.name if question.messages is not None else None,
            weights=sampler.weights,
            prompt_tokens=prompt.length,
            group_id=group.group_id if group is not None else None,
        )

    return await ask(
        workspace,
        source,
        key=("sample", repr(question)),
        renderer_name=question.renderer,
        render=lambda renderer: _prompt(question, renderer),
        use=use,
    )


def _params(question: Question, stop: Any) -> tinker.SamplingParams:
    import tinker

    return tinker.SamplingParams(
        max_tokens=question.max_tokens,
        temperature=question.temperature,
        top_k=question.top_k,
        top_p=question.top_p,
        seed=question.seed,
        stop=stop,
    )


def _kept(
    workspace: Workspace,
    sampler: Sampler,
    renderer: ModelRenderer,
    prompt: tinker.ModelInput,
    sequences: Sequence[Any],
    temperature: float,
) -> Group | None:
    """The group of several samples, stored; None for a single one."""
    if len(sequences) == 1:
        return None
    group = Group(
        group_id=workspace.next_id("group"),
        base_model=sampler.base_model,
        renderer=renderer.name,
        prompt=prompt,
        sequences=[
            SampledSequence(list(drawn.tokens), None if drawn.logprobs is None else drawn.logprobs)
            for drawn in sequences
        ],
        weights=sampler.weights,
        temperature=temperature,
    )
    keep(workspace.groups, group)
    return group


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
        what = message_problem(question.messages or ()) or repr(error)
        raise InvalidInputError(
            f"The renderer {renderer.name} refuses these messages: {what}"[:400],
            next_step='Give a list of {"role", "content"} that ends with a user message.',
        ) from error
    return prompt, stop or renderer.stop()


def _answer(sequence: Any, question: Question, renderer: ModelRenderer) -> Answer:
    message = None
    if question.messages is not None:
        parsed, ending = renderer.renderer.parse_response(sequence.tokens)
        text, message = in_words(parsed)
        is_complete = ending.is_clean
    else:
        text, is_complete = renderer.plain_text(sequence.tokens), sequence.stop_reason == "stop"
    logprobs = sequence.logprobs or [0.0]
    return Answer(
        text=text,
        stop_reason=sequence.stop_reason,
        tokens=len(sequence.tokens),
        mean_logprob=sum(logprobs) / len(logprobs),
        is_complete=is_complete,
        message=message,
    )


def in_words(parsed: Message) -> tuple[str, dict[str, Any] | None]:
    """The text of a parsed message, and the message as JSON where that says more.

    It does with tool calls, well-formed or not, and with content in parts, such as thinking.
    """
    from tinker_cookbook.renderers import format_content_as_string

    content = parsed["content"]
    text = format_content_as_string(content)
    calls = {
        name: [call.model_dump(mode="json", exclude_none=True) for call in parsed[name]]
        for name in ("tool_calls", "unparsed_tool_calls")
        if parsed.get(name)
    }
    if not calls and (isinstance(content, str) or all(p["type"] == "text" for p in content)):
        return text, None
    return text, {"role": parsed["role"], "content": content, **calls}
