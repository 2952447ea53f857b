"""The prompts of a run, read and rendered, with all their checks: what rl and distillation plan on.

Nothing is sampled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.runs import prompts
from tinker_mcp.runs.planning import checks
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.checks import Base
from tinker_mcp.runs.planning.findings import Findings
from tinker_mcp.runs.planning.sets import LONGEST
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.spec import DataFacts
from tinker_mcp.settings import Settings
from tinker_mcp.training import datasets, roots
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.rendering import ModelRenderer

_SHOWN_ROWS = 5


@dataclass(frozen=True)
class Prompts:
    """Prompts of one source; `lengths` are their tokens."""

    source: str
    prompts: Sequence[Prompt]
    lengths: Sequence[int]

    @property
    def facts(self) -> DataFacts:
        """As the spec has them, but for the hash of a file that is not written yet."""
        return DataFacts(
            source=self.source,
            sha256="",
            datums=len(self.prompts),
            tokens=sum(self.lengths),
            trained_tokens=0,
        )


@dataclass(frozen=True)
class PromptSets:
    """What is asked in training, and in an evaluation."""

    train: Prompts
    held_out: Prompts | None
    renderer: ModelRenderer
    max_length: int


def build(
    settings: Settings,
    arguments: RunArguments,
    backend: Backend,
    base: Base,
    max_tokens: int,
    findings: Findings,
) -> PromptSets | None:
    """Both sets; None where one cannot be used, which `findings` says. Blocks.

    Args:
        max_tokens: Of an answer, which must have room behind each prompt.
    """
    model = checks.renderer(backend, base.model_name, arguments.renderer, findings)
    if model is None:
        return None
    limit = base.limit or LONGEST
    max_length = min(arguments.max_length or limit, limit)
    given = {"data": arguments.data, "eval_data": arguments.eval_data}
    found = {
        argument: _of_file(
            settings, argument, data, arguments, model, max_length - max_tokens, findings
        )
        for argument, data in given.items()
        if data is not None
    }
    train, held_out = found.get("data"), found.get("eval_data")
    if train is None or None in found.values():
        return None
    if held_out is None and arguments.eval_share:
        try:
            train, held_out = _split(train, arguments.eval_share, arguments.seed)
        except TinkerMcpError as error:
            findings.refuse_error(error)
            return None
    return PromptSets(train, held_out, model, max_length)


def _of_file(
    settings: Settings,
    argument: str,
    data: str,
    arguments: RunArguments,
    model: ModelRenderer,
    longest: int,
    findings: Findings,
) -> Prompts | None:
    try:
        path = roots.allowed(data, settings)
        rows, problems = prompts.read(path, data, arguments.columns)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return None
    if problems:
        shown = "".join(f"\n   - {str(one)[:200]}" for one in problems[:_SHOWN_ROWS])
        findings.refuse(
            f"{len(problems)} of {len(rows) + len(problems)} rows of {argument}={data!r} hold no "
            f"prompt:{shown}",
            '\n   Give rows with "prompt" (text) or "messages", or name their column in columns.',
        )
        return None
    try:
        lengths = [model.prompt(row.messages).length for row in rows]  # type: ignore[arg-type]  # checked by prompts
    except Exception as error:  # a renderer refuses with assertions as well as with RendererError
        findings.refuse(
            f"The renderer {model.name} refuses a prompt of {argument}={data!r}: {error!r}"[:400],
            "Mend the row, or give another renderer.",
        )
        return None
    if max(lengths) > longest:
        findings.refuse(
            f"The longest prompt of {argument}={data!r} has {max(lengths)} tokens, and with "
            f"max_tokens for the answer there is room for {max(longest, 0)}",
            "Give a smaller max_tokens, or leave out or shorten the longest rows.",
        )
        return None
    return Prompts(str(path), rows, lengths)


def _split(whole: Prompts, share: float, seed: int) -> tuple[Prompts, Prompts]:
    pairs = list(zip(whole.prompts, whole.lengths, strict=True))
    first, second = (
        Prompts(whole.source, [row for row, _ in side], [length for _, length in side])
        for side in datasets.split(pairs, share, seed)
    )
    return first, second
