"""Tokens and weights to `tinker.Datum`, and what such a batch amounts to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tinker_mcp import garbage
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import libraries
from tinker_mcp.training.checks import datum_problem
from tinker_mcp.training.formats import Conversation, Example, Pair, Text
from tinker_mcp.training.problems import Problem
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

Reduction = Literal["none", "mean"]

DatumKind = Literal["supervised", "text", "preference", "policy_gradient"]
"""What datums are for. `preference` comes in pairs: chosen, rejected, chosen, rejected ..."""


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
    split_texts: int = 0


@dataclass(frozen=True)
class Rendered:
    """Datums of conversations, how many of these were truncated, and why others gave none.

    Attributes:
        lost_tokens: What the truncated ones lost together.
        split_texts: Texts longer than max_length, which became several datums.
    """

    datums: Sequence[tinker.Datum]
    truncated: int
    problems: Sequence[Problem]
    lost_tokens: int = 0
    split_texts: int = 0


def supervised_datum(
    messages: Conversation,
    renderer: ModelRenderer,
    train_on_what: str,
    max_length: int,
    reduction: Reduction,
) -> tuple[tinker.Datum, int]:
    """Make a datum for `cross_entropy`, shifted so that position t predicts token t+1.

    Args:
        max_length: Longer conversations lose their end.
        reduction: `none` leaves each weight 0 or 1; `mean` makes a datum's weights sum to 1.

    Returns:
        The datum, of N-1 positions for N tokens (`model_input` tokens[:-1], `target_tokens`
        tokens[1:], `weights` weights[1:]), and how many tokens were cut off.

    Raises:
        InvalidInputError: The renderer refuses the conversation, or no target carries weight.
    """
    try:
        model_input, weights = renderer.supervised(messages.messages, train_on_what)  # type: ignore[arg-type]  # checked by formats
    except Exception as error:  # a renderer refuses with assertions as well as with RendererError
        raise _refused(f"the renderer {renderer.name} refuses it: {str(error)[:200]}") from error
    cut = max(0, model_input.length - max_length)
    return _datum(model_input, weights, max_length, reduction), cut


def text_datums(
    text: Text, renderer: ModelRenderer, max_length: int, reduction: Reduction
) -> list[tinker.Datum]:
    """Like `supervised_datum`, of plain text: no chat format, every target token trained.

    Returns:
        A datum of every `max_length` tokens, so that a long text loses nothing but the first token
        of each piece as a target, and a last piece of one token.

    Raises:
        InvalidInputError: The text is one token long.
    """
    import tinker

    tokens = renderer.encode(text.text)
    if len(tokens) < 2:
        raise _refused(f"its text is {len(tokens)} token long, so none follows another")
    starts = range(0, len(tokens) - 1, max_length)
    pieces = [tinker.ModelInput.from_ints(tokens[at : at + max_length]) for at in starts]
    return [_datum(piece, [1.0] * piece.length, max_length, reduction) for piece in pieces]


def preference_datums(
    pair: Pair, renderer: ModelRenderer, max_length: int
) -> tuple[list[tinker.Datum], int]:
    """Two datums, chosen then rejected, each trained on its last reply only.

    What `tinker_cookbook.preference.dpo_datasets` makes of a comparison: DPO compares sums of
    logprobs, so the weights stay 0 or 1.

    Returns:
        The two, and how many tokens were cut off from both.

    Raises:
        InvalidInputError: As for `supervised_datum`, or what is left of the two is the same.
    """
    datums, cuts = [], []
    for name, messages in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        side = Conversation(pair.place, messages)
        try:
            datum, cut = supervised_datum(
                side, renderer, "last_assistant_message", max_length, "none"
            )
        except InvalidInputError as error:
            raise _refused(f"{name}: {error.problem}") from error
        datums.append(datum)
        cuts.append(cut)
    if _tokens(datums[0]) == _tokens(datums[1]):
        raise _refused(
            f"chosen and rejected are the same within max_length {max_length}"
            if any(cuts)
            else "chosen and rejected are the same tokens"
        )
    return datums, sum(cuts)


def render(
    examples: Sequence[Example],
    renderer: ModelRenderer,
    train_on_what: str,
    max_length: int,
    reduction: Reduction,
) -> Rendered:
    """Make datums of each example that gives them, checked. Blocks.

    Args:
        train_on_what, reduction: For conversations; a pair has its own rule, a text trains all.
    """
    datums: list[tinker.Datum] = []
    truncated = lost_tokens = split_texts = 0
    problems: list[Problem] = []
    vocabulary = renderer.vocabulary_size
    with garbage.while_building():
        for example in examples:
            try:
                made, cut = _datums_of(example, renderer, train_on_what, max_length, reduction)
                for datum in made:
                    what = datum_problem(datum, vocabulary)
                    if what:
                        raise _refused(what)
            except InvalidInputError as error:
                problems.append(Problem(example.place, error.problem, "not_rendered"))
                continue
            datums += made
            truncated += cut > 0
            lost_tokens += cut
            split_texts += isinstance(example, Text) and len(made) > 1
    return Rendered(datums, truncated, problems, lost_tokens, split_texts)


def _datums_of(
    example: Example,
    renderer: ModelRenderer,
    train_on_what: str,
    max_length: int,
    reduction: Reduction,
) -> tuple[list[tinker.Datum], int]:
    if isinstance(example, Pair):
        return preference_datums(example, renderer, max_length)
    if isinstance(example, Text):
        return text_datums(example, renderer, max_length, reduction), 0
    datum, cut = supervised_datum(example, renderer, train_on_what, max_length, reduction)
    return [datum], cut


def _datum(
    model_input: tinker.ModelInput, weights: list[float], max_length: int, reduction: Reduction
) -> tinker.Datum:
    """The cookbook's shift, cut and reduction."""
    with libraries.loading():
        import torch
        from tinker_cookbook.supervised.common import datum_from_model_input_weights

    if not any(weights):
        raise _refused("no token of it is to be trained (train_on_what, and weight 0 of messages)")
    datum = datum_from_model_input_weights(
        model_input, torch.tensor(weights), max_length=max_length, reduction=reduction
    )
    if not any(datum.loss_fn_inputs["weights"].tolist()):
        raise _refused(
            f"no token to train on is left within max_length {max_length} of its "
            f"{model_input.length} tokens: raise max_length"
        )
    return datum


def _refused(what: str) -> InvalidInputError:
    return InvalidInputError(what, next_step="")


def _tokens(datum: tinker.Datum) -> list[int]:
    return [*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()[-1]]


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
    """Target tokens that count in the loss."""
    what_counts = _what_counts(datum)
    return (
        datum.model_input.length
        if what_counts is None
        else int((what_counts.to_numpy() != 0).sum())
    )


def is_trained(datum: tinker.Datum) -> list[bool]:
    """Whether each target token counts: by its weight, its mask, or an advantage other than 0."""
    what_counts = _what_counts(datum)
    if what_counts is None:
        return [True] * datum.model_input.length
    return [value != 0 for value in what_counts.tolist()]


def _what_counts(datum: tinker.Datum) -> tinker.TensorData | None:
    inputs = datum.loss_fn_inputs
    return next((inputs[n] for n in ("weights", "mask", "advantages") if n in inputs), None)


def weight_sum(datums: Sequence[tinker.Datum]) -> float:
    """What a summed loss is divided by to get the loss per unit of weight.

    A datum without weights, such as one for `importance_sampling`, counts its trained tokens.
    """
    return float(sum(map(_weight, datums)))


def _weight(datum: tinker.Datum) -> float:
    weights = datum.loss_fn_inputs.get("weights")
    return trained_tokens(datum) if weights is None else float(weights.to_numpy().sum(dtype=float))
