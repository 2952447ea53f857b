"""How likely a given text is, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.rendering import ModelRenderer
from tinker_mcp.training.samplers import Sampler, Source, ask


@dataclass(frozen=True)
class Scoring:
    """What to score: `text`, or the assistant's tokens of `messages`.

    `completion` is what follows either of them; then only its tokens count.
    """

    text: str | None
    messages: Sequence[Mapping[str, Any]] | None
    completion: str | None
    renderer: str | None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's place in the sequence, its text, and its log-probability in nats."""

    position: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TextLogprobs:
    """The scored tokens in their order, and who scored them."""

    tokens: list[TokenLogprob]
    backend: str
    base_model: str
    renderer: str | None
    weights: str


_Rendered = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and whether each counts."""


async def compute(workspace: Workspace, source: Source, scoring: Scoring) -> TextLogprobs | None:
    """Score; None when it takes longer than a call may (ask again with the same values).

    Raises:
        InvalidInputError: Not exactly one source, not exactly one of text and messages, or nothing
            in them that could be scored.
    """
    source.check("compute_logprobs")
    if (scoring.text is None) == (scoring.messages is None):
        raise InvalidInputError(
            "compute_logprobs needs either text or messages.",
            next_step="Give exactly one; completion is what follows it.",
        )

    async def use(sampler: Sampler, renderer: ModelRenderer, rendered: _Rendered) -> TextLogprobs:
        import tinker

        tokens, counts = rendered
        found = await sampler.client.compute_logprobs(tinker.ModelInput.from_ints(list(tokens)))
        return TextLogprobs(
            tokens=[
                TokenLogprob(position, renderer.decode([token]), logprob)
                for position, (token, is_scored, logprob) in enumerate(
                    zip(tokens, counts, found, strict=True)
                )
                if is_scored and logprob is not None
            ],
            backend=sampler.backend.label,
            base_model=sampler.base_model,
            renderer=renderer.name if scoring.messages is not None else None,
            weights=sampler.weights,
        )

    return await ask(
        workspace,
        source,
        key=("compute_logprobs", repr(scoring)),
        renderer_name=scoring.renderer,
        render=lambda renderer: _rendered(scoring, renderer),
        use=use,
    )


def _rendered(scoring: Scoring, renderer: ModelRenderer) -> _Rendered:
    tokens, counts = (
        _of_messages(scoring, renderer)
        if scoring.messages is not None
        else _of_text(scoring, renderer)
    )
    counts[:1] = [False]  # nothing comes before the first token that could predict it
    if not any(counts):
        raise InvalidInputError(
            "There is no token to score: the first has nothing before it, and of messages only "
            "the assistant's count.",
            next_step="Give completion, or messages that end with an assistant message.",
        )
    return tokens, counts


def _of_text(scoring: Scoring, renderer: ModelRenderer) -> tuple[list[int], list[bool]]:
    text = renderer.encode(scoring.text or "")
    if scoring.completion is None:
        return text, [True] * len(text)
    completion = renderer.tokenizer.encode(scoring.completion, add_special_tokens=False)
    return [*text, *completion], [False] * len(text) + [True] * len(completion)


def _of_messages(scoring: Scoring, renderer: ModelRenderer) -> tuple[list[int], list[bool]]:
    messages = list(scoring.messages or ())
    what = "all_assistant_messages"
    if scoring.completion is not None:
        messages.append({"role": "assistant", "content": scoring.completion})
        what = "last_assistant_message"
    try:
        model_input, weights = renderer.supervised(messages, what)  # type: ignore[arg-type]  # the renderer checks
    except Exception as error:  # a renderer refuses with assertions as well as with RendererError
        raise InvalidInputError(
            f"The renderer {renderer.name} refuses these messages: {error!r}"[:400],
            next_step='Give a list of {"role", "content"} and, if it ends with a user message, '
            "completion.",
        ) from error
    return list(model_input.to_ints()), [weight > 0 for weight in weights]
