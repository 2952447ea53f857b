"""Tokens and weights to `tinker.Datum`, and what such a batch amounts to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.datasets import Conversation, Problem
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

Reduction = Literal["none", "mean"]

DatumKind = Literal["supervised", "text", "preference", "policy_gradient"]
"""What datums are for. `preference` comes in pairs: chosen, rejected, chosen, rejected ..."""

_SHOWN_CHARACTERS = 1200


@dataclass(frozen=True)
class TokenStatistics:
    """Lengths over all datums; `trained` counts target tokens with weight above 0."""

    total: int
    trained: int
    shortest: int
    median: int
    longest: int


@dataclass(frozen=True)
class DatumSet:
    """Datums kept under a handle, with what is needed to use them rightly."""

    data_id: str
    base_model: str
    renderer: str
    datums: Sequence[tinker.Datum]
    truncated: int
    statistics: TokenStatistics
    example: str
    kind: DatumKind = "supervised"


@dataclass(frozen=True)
class Rendered:
    """Datums of conversations, how many of these were truncated, and why others gave none."""

    datums: Sequence[tinker.Datum]
    truncated: int
    problems: Sequence[Problem]


def supervised_datum(
    messages: Conversation,
    renderer: ModelRenderer,
    train_on_what: str,
    max_length: int,
    reduction: Reduction,
) -> tuple[tinker.Datum, bool]:
    """Make a datum for `cross_entropy`, shifted so that position t predicts token t+1.

    Args:
        max_length: Longer conversations lose their end.
        reduction: `none` leaves each weight 0 or 1; `mean` makes a datum's weights sum to 1.

    Returns:
        The datum, of N-1 positions for N tokens (`model_input` tokens[:-1], `target_tokens`
        tokens[1:], `weights` weights[1:]), and whether it was truncated.

    Raises:
        InvalidInputError: The renderer refuses the conversation, or no target carries weight.
    """
    import torch
    from tinker_cookbook.supervised.common import datum_from_model_input_weights

    try:
        model_input, weights = renderer.supervised(messages.messages, train_on_what)  # type: ignore[arg-type]  # checked by datasets
    except Exception as error:  # a renderer refuses with assertions as well as with RendererError
        raise InvalidInputError(
            f"the renderer {renderer.name} refuses it: {str(error)[:200]}", next_step=""
        ) from error
    datum = datum_from_model_input_weights(
        model_input, torch.tensor(weights), max_length=max_length, reduction=reduction
    )
    if not any(datum.loss_fn_inputs["weights"].tolist()):
        raise InvalidInputError(
            f"no token to train on is left within max_length {max_length} of its "
            f"{model_input.length} tokens: raise max_length",
            next_step="",
        )
    return datum, model_input.length > max_length


def render(
    conversations: Sequence[Conversation],
    renderer: ModelRenderer,
    train_on_what: str,
    max_length: int,
    reduction: Reduction,
) -> Rendered:
    """Make a datum of each conversation that gives one. Blocks."""
    datums: list[tinker.Datum] = []
    truncated = 0
    problems: list[Problem] = []
    for conversation in conversations:
        try:
            datum, was_cut = supervised_datum(
                conversation, renderer, train_on_what, max_length, reduction
            )
        except InvalidInputError as error:
            problems.append(Problem(conversation.place, error.problem))
            continue
        datums.append(datum)
        truncated += was_cut
    return Rendered(datums, truncated, problems)


def measure(datums: Sequence[tinker.Datum]) -> TokenStatistics:
    """Count tokens: a datum of N-1 positions stands for N."""
    lengths = [datum.model_input.length + 1 for datum in datums]
    return TokenStatistics(
        total=sum(lengths),
        trained=sum(trained_tokens(datum) for datum in datums),
        shortest=min(lengths),
        median=int(statistics.median(lengths)),
        longest=max(lengths),
    )


def trained_tokens(datum: tinker.Datum) -> int:
    """Target tokens that carry weight."""
    return sum(weight > 0 for weight in datum.loss_fn_inputs["weights"].tolist())


def weight_sum(datums: Sequence[tinker.Datum]) -> float:
    """What a summed loss is divided by to get the loss per unit of weight."""
    return float(sum(sum(datum.loss_fn_inputs["weights"].tolist()) for datum in datums))


def marked(datum: tinker.Datum, renderer: ModelRenderer) -> str:
    """A datum's text with the trained tokens between ⟦ and ⟧."""
    tokens = [*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()[-1]]
    is_trained = [False, *(weight > 0 for weight in datum.loss_fn_inputs["weights"].tolist())]
    parts: list[str] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or is_trained[end] != is_trained[start]:
            text = renderer.decode(tokens[start:end])
            parts.append(f"⟦{text}⟧" if is_trained[start] else text)
            start = end
    whole = "".join(parts)
    if len(whole) <= _SHOWN_CHARACTERS:
        return whole
    half = _SHOWN_CHARACTERS // 2
    return f"{whole[:half]} ... {whole[-half:]}"
