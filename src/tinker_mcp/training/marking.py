"""A datum as text, the trained tokens between marks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinker_mcp.training.datums import is_trained
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

_MARKS = (("⟦", "⟧"), ("⟪", "⟫"), ("⦅", "⦆"), ("<<TRAINED:", ":TRAINED>>"))
_SHOWN_CHARACTERS = 1200


def marked(datum: tinker.Datum, renderer: ModelRenderer) -> str:
    """A datum's text with the trained tokens between ⟦ and ⟧.

    Where the text itself holds one of these, other marks are taken, and a first line says which.
    """
    spans = _spans(datum, renderer)
    text = "".join(part for part, _ in spans)
    opening, closing = _marks_not_in(text)
    whole = "".join(f"{opening}{part}{closing}" if trained else part for part, trained in spans)
    if len(whole) > _SHOWN_CHARACTERS:
        half = _SHOWN_CHARACTERS // 2
        whole = f"{whole[:half]} ... {whole[-half:]}"
    if (opening, closing) == _MARKS[0]:
        return whole
    return f"[trained tokens stand between {opening} and {closing}]\n{whole}"


def _spans(datum: tinker.Datum, renderer: ModelRenderer) -> list[tuple[str, bool]]:
    """Runs of tokens alike in being trained, as text."""
    tokens = [*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()[-1]]
    trained = [False, *is_trained(datum)]
    spans: list[tuple[str, bool]] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or trained[end] != trained[start]:
            spans.append((renderer.decode(tokens[start:end]), trained[start]))
            start = end
    return spans


def _marks_not_in(text: str) -> tuple[str, str]:
    for opening, closing in _MARKS:
        if opening not in text and closing not in text:
            return opening, closing
    number = next(n for n in range(1, len(text) + 2) if f"<<TRAINED-{n}:" not in text)
    return f"<<TRAINED-{number}:", f":TRAINED-{number}>>"
