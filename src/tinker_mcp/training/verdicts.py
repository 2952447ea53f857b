"""What a dataset is good for: one verdict a training method, with the call to make.

Knows layouts and counts; knows no files and no tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tinker_mcp.training.formats import LAYOUTS_OF_KIND, NEEDED, Layout, columns_of
from tinker_mcp.training.problems import Problem

Method = Literal["sft", "dpo", "rl", "distillation"]
Fitness = Literal["ready", "needs_mapping", "incompatible"]

_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "prompt": (
        *("question", "query", "instruction", "problem", "user", "input", "source", "request"),
        *("inputs", "input_text", "human"),
    ),
    "completion": (
        *("response", "answer", "output", "reply", "solution", "assistant", "target", "targets"),
        *("generation", "output_text", "label", "chosen", "gpt", "summary"),
    ),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns", "chosen"),
    "text": ("content", "body", "document", "article", "story", "raw", "passage"),
    "chosen": (
        *("accepted", "preferred", "winner", "better", "chosen_response", "response_chosen"),
        *("positive",),
    ),
    "rejected": (
        *("refused", "dispreferred", "loser", "worse", "rejected_response", "response_rejected"),
        *("negative",),
    ),
}
_LISTS = {"messages"}
_SAMPLE = (
    "sample(messages=..., num_samples=8) on its prompts, score each, then "
    'build_datums(kind="policy_gradient", groups=[{"group_id": ..., "rewards": [...]}])'
)
_TEACH = (
    "sample(messages=..., num_samples=1) from the teacher on its prompts, then "
    'build_datums(kind="supervised", conversations=[...]) of its answers'
)


@dataclass(frozen=True)
class Verdict:
    """Whether a method can train on the dataset.

    Attributes:
        why: Of `ready`, how many rows; of the others what is missing.
        call: The next call, with its arguments; empty where there is none.
    """

    method: Method
    fitness: Fitness
    why: str
    call: str


@dataclass(frozen=True)
class Counted:
    """What a pass over the rows counted.

    Attributes:
        usable: Rows without a problem, by layout.
        prompts: Rows with a prompt to answer, reply or not.
        failures: The first problem with a row of a layout.
        columns: Rows that have a column, and of `lists` those where it holds a list.
    """

    path: str
    base_model: str | None
    mapping: Mapping[str, str]
    total: int
    usable: Counter[Layout]
    prompts: int
    failures: Mapping[Layout, Problem]
    columns: Counter[str]
    lists: Counter[str]


def verdicts(counted: Counted) -> list[Verdict]:
    """One verdict a method."""
    return [
        _trained(counted, "sft", ("supervised", "text")),
        _trained(counted, "dpo", ("preference",)),
        _prompted(counted, "rl", 'method="rl"', 'rl={"reward": ...}', _SAMPLE),
        _prompted(counted, "distillation", 'method="distill"', 'distill={"teacher": ...}', _TEACH),
    ]


def _trained(counted: Counted, method: Method, kinds: Sequence[str]) -> Verdict:
    rows = {kind: sum(counted.usable[name] for name in LAYOUTS_OF_KIND[kind]) for kind in kinds}
    kind = max(kinds, key=lambda each: rows[each])
    if rows[kind]:
        why = f"{rows[kind]} of {counted.total} rows can be used{_unused(counted, kind)}"
        skips = rows[kind] < counted.total
        return Verdict(method, "ready", why, _call(counted, method, kind, {}, skips))
    for kind in kinds:
        for layout in LAYOUTS_OF_KIND[kind]:
            if layout in counted.failures:
                why = f"every row has a problem, such as {str(counted.failures[layout])[:150]}"
                return Verdict(method, "incompatible", why, "")
            mapping = _mapping(counted, layout)
            if mapping:
                why = f"its columns have other names than {' and '.join(NEEDED[layout])}"
                call = _call(counted, method, kind, mapping, False)
                return Verdict(method, "needs_mapping", why, call)
    return Verdict(method, "incompatible", _missing(method, counted), "")


def _unused(counted: Counted, kind: str) -> str:
    """Columns that a build would pass over, such as `tools`: better said than silent."""
    layouts = [name for name in LAYOUTS_OF_KIND[kind] if counted.usable[name]]
    used = {column for name in layouts for column in columns_of(name)}
    names = [name for name in counted.columns if name not in used | set(counted.mapping.values())]
    return f"; columns not used: {', '.join(name[:40] for name in names[:6])}" if names else ""


def _prompted(counted: Counted, method: Method, of_run: str, options: str, by_hand: str) -> Verdict:
    if counted.prompts:
        why = f"{counted.prompts} of {counted.total} rows have a prompt to answer"
        return Verdict(method, "ready", why, f"{_run(counted, of_run, {}, options)}; or {by_hand}")
    mapping = _mapping(counted, "prompt")
    if mapping:
        why = f"its prompts stand in {mapping['prompt']!r}"
        call = f"{_run(counted, of_run, mapping, options)}; or {_inspect(counted, mapping)}, then "
        return Verdict(method, "needs_mapping", why, call + by_hand)
    return Verdict(method, "incompatible", "no row has a prompt to answer", "")


def _mapping(counted: Counted, layout: Layout) -> dict[str, str]:
    """Columns that a layout needs, each from a column of the file that most rows have."""
    mapping: dict[str, str] = {}
    common = {name for name, rows in counted.columns.items() if 2 * rows > counted.total}
    by_lower = {name.lower(): name for name in common}
    needed = [*NEEDED[layout], *(["prompt"] if layout == "preference_pair" else [])]
    for column in needed:
        if column in common:
            continue
        candidates = [by_lower[name] for name in _SYNONYMS.get(column, ()) if name in by_lower]
        candidates = [
            name
            for name in candidates
            if (2 * counted.lists[name] > counted.total) is (column in _LISTS)
            and name not in mapping.values()
        ]
        if candidates:
            mapping[column] = candidates[0]
        elif column in NEEDED[layout]:
            return {}
    return mapping


def _missing(method: Method, counted: Counted) -> str:
    names = ", ".join(name[:40] for name, _ in counted.columns.most_common(8)) or "no objects"
    if method == "dpo":
        return f"no pairs of a chosen and a rejected reply; columns: {names}"
    if counted.prompts:
        return f"no replies to train on; columns: {names}"
    return f"neither conversations nor text that can be trained on; columns: {names}"


def _call(
    counted: Counted, method: Method, kind: str, mapping: Mapping[str, str], skips: bool
) -> str:
    """How to build datums, and how to have a run of them; that one takes no row that is wrong."""
    parts = [f'path="{counted.path}"', _model(counted), f'kind="{kind}"']
    parts += _columns({**counted.mapping, **mapping})
    parts += ["skip_invalid=true"] if skips else []
    build = f"build_datums({', '.join(parts)})"
    if skips:
        return build
    of_run = f'method="{method}"'
    return f"{build} or {_run(counted, of_run, mapping, 'eval_share=0.1')}"


def _run(counted: Counted, method: str, mapping: Mapping[str, str], options: str) -> str:
    columns = _columns({**counted.mapping, **mapping})
    parts = [method, f'data="{counted.path}"', _model(counted), *columns, options]
    return f"start_run({', '.join(parts)})"


def _model(counted: Counted) -> str:
    return f'base_model="{counted.base_model}"' if counted.base_model else "base_model=..."


def _inspect(counted: Counted, mapping: Mapping[str, str]) -> str:
    columns = _columns({**counted.mapping, **mapping})
    arguments = ", ".join([f'path="{counted.path}"', *columns])
    return f"inspect_dataset({arguments})"


def _columns(mapping: Mapping[str, str]) -> list[str]:
    inside = ", ".join(f'"{name}": "{theirs}"' for name, theirs in mapping.items())
    return [f"columns={{{inside}}}"] if mapping else []
