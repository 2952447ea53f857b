"""A few samples a step in words: `transcripts.jsonl` in the run's folder, which stays small."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinker_mcp.runs.policy.rollouts import Rolled
    from tinker_mcp.training.rendering import ModelRenderer

FILE_NAME = "transcripts.jsonl"
MAX_BYTES = 4 * 2**20
_PROMPT_CHARACTERS = 1000  # the end of it: it comes again every turn
_ANSWER_CHARACTERS = 2000
_TURNS = 12
_TAIL_BYTES = 2**18


def path_in(folder: Path) -> Path:
    """The file of a run's folder."""
    return folder / FILE_NAME


def chosen(
    groups: Sequence[Rolled], count: int, step: int, renderer: ModelRenderer
) -> list[dict[str, Any]]:
    """The best, the worst and those between, by reward, each as it reads."""
    samples = [
        (reward, group, place) for group in groups for place, reward in enumerate(group.rewards)
    ]
    samples.sort(key=lambda sample: sample[0], reverse=True)
    places = _spread(len(samples), count)
    return [
        {
            "step": step,
            "reward": samples[place][0],
            "rank": place + 1,
            "of": len(samples),
            "turns": _turns(samples[place][1], samples[place][2], renderer),
        }
        for place in places
    ]


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add transcripts; the oldest go where there are too many."""
    if not lines:
        return
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        size = file.tell()
    if size > MAX_BYTES:
        kept = list(_lines(path.read_bytes()))
        _write(path, kept[len(kept) // 2 :])


def rewind(path: Path, step: int) -> None:
    """Drop those after a step, which will come again."""
    if path.exists():
        _write(path, [line for line in _lines(path.read_bytes()) if line.get("step", 0) <= step])


def last(path: Path, count: int) -> list[dict[str, Any]]:
    """The newest transcripts, in order; none where there is no file."""
    if count <= 0 or not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
        file.seek(start)
        end = file.read()
    return list(_lines(end.partition(b"\n")[2] if start else end))[-count:]


def _spread(total: int, count: int) -> list[int]:
    """Places from the first to the last, evenly; with three, the best, the median, the worst."""
    if count <= 0 or total == 0:
        return []
    if count == 1:
        return [0]
    places = [round(n * (total - 1) / (count - 1)) for n in range(count)]
    return list(dict.fromkeys(places))


def _turns(group: Rolled, place: int, renderer: ModelRenderer) -> list[dict[str, Any]]:
    trajectory = group.trajectories.trajectories_G[place]
    return [
        {
            "prompt": _text_of(turn.ob, renderer)[-_PROMPT_CHARACTERS:],
            "answer": renderer.decode(turn.ac.tokens)[:_ANSWER_CHARACTERS],
            "tokens": len(turn.ac.tokens),
            "stop_reason": turn.ac.stop_reason,
            **({"reward": turn.reward} if turn.reward else {}),
            **({"logs": {k: str(v)[:200] for k, v in turn.logs.items()}} if turn.logs else {}),
        }
        for turn in trajectory.transitions[:_TURNS]
    ]


def _text_of(model_input: Any, renderer: ModelRenderer) -> str:
    tokens = [t for chunk in model_input.chunks for t in getattr(chunk, "tokens", ())]
    return renderer.decode(tokens)


def _lines(written: bytes) -> Iterator[dict[str, Any]]:
    for text in written.splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # torn by a kill
            continue
        if isinstance(line, dict):
            yield line


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    number, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(number, "wb") as file:
        file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    Path(partial).replace(path)
