"""A reward put to the test: labelled cases, real samples, and the answers that games find."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tinker_mcp.training.rewards.contract import Completion, Reward, Row, Scored
from tinker_mcp.training.rewards.rows import answer_of, completions_of, group_of, prompt_of

_SAME = 1e-6
_BINS = 5
_REPEATS = 10
MAX_GAME_ROWS = 32


@dataclass(frozen=True)
class Case:
    """A completion whose value is known, or only asked for."""

    completion: str
    row: Row
    expected: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A case's result; `is_ok` is None where nothing was expected."""

    scored: Scored
    expected: float | None

    @property
    def is_ok(self) -> bool | None:
        """Whether it has the value that was expected; an error never has."""
        if self.expected is None:
            return None
        value = self.scored.value
        return value is not None and abs(value - self.expected) <= _SAME


@dataclass(frozen=True)
class Distribution:
    """Of the values there are; `histogram` counts bins of equal width by their lower edge."""

    values: int
    minimum: float
    mean: float
    maximum: float
    std: float
    histogram: Mapping[str, int]


@dataclass(frozen=True)
class Groups:
    """Groups of several values, and how many of them teach nothing."""

    count: int
    all_zero: int
    all_one: int
    constant: int


@dataclass(frozen=True)
class Game:
    """What an answer without merit earns.

    Attributes:
        as_good: In how many of the rows it earns as much as the best honest answer, where that
            earns more than the least value seen.
    """

    mean: float | None
    rows: int
    as_good: int


@dataclass(frozen=True)
class Trial:
    """All that was found."""

    verdicts: Sequence[Verdict]
    distribution: Distribution | None
    samples: int
    errors: Mapping[str, int]
    groups: Groups | None
    games: Mapping[str, Game]
    seconds: float
    warnings: Sequence[str] = field(default_factory=tuple)


async def trial(
    reward: Reward, cases: Sequence[Case], rows: Sequence[Row], column: str | None
) -> Trial:
    """Score cases, the real completions of `rows`, and the games on those rows (or the cases').

    Args:
        column: Where the reward looks for the expected answer, if that is known.
    """
    began = time.monotonic()
    of_cases = await _scored(reward, [(case.completion, case.row) for case in cases])
    real = [(index, text) for index, row in enumerate(rows) for text in completions_of(row)]
    of_real = await _scored(reward, [(text, rows[index]) for index, text in real])
    honest: defaultdict[int, list[float]] = defaultdict(list)
    if rows:
        tried: Sequence[Row] = rows[:MAX_GAME_ROWS]
        for (index, _), scored in zip(real, of_real, strict=True):
            _note(honest, index, scored)
    else:
        tried = [case.row for case in cases[:MAX_GAME_ROWS] if case.row]
        with_row = [scored for case, scored in zip(cases, of_cases, strict=True) if case.row]
        for index, scored in enumerate(with_row[:MAX_GAME_ROWS]):
            _note(honest, index, scored)
    of_games = {
        name: await _scored_where(reward, texts, tried)
        for name, texts in _games(tried, column).items()
    }
    everything = [*of_cases, *of_real, *(s for found in of_games.values() for s in found if s)]
    seconds = time.monotonic() - began
    values = [scored.value for scored in everything if scored.value is not None]
    found = Trial(
        verdicts=[
            Verdict(scored, case.expected) for case, scored in zip(cases, of_cases, strict=True)
        ],
        distribution=_distribution([*of_cases, *of_real]),
        samples=len(everything),
        errors=Counter(s.error for s in everything if s.error is not None),
        groups=_groups(rows, real, of_real),
        games=_judged(of_games, honest, min(values, default=0.0)),
        seconds=seconds,
    )
    return Trial(**{**vars(found), "warnings": _warnings(found, values)})


async def _scored(reward: Reward, samples: Sequence[tuple[str, Row]]) -> Sequence[Scored]:
    if not samples:
        return []
    texts, rows = zip(*samples, strict=True)
    return await reward.score([Completion(text) for text in texts], rows)


async def _scored_where(
    reward: Reward, texts: Sequence[str | None], rows: Sequence[Row]
) -> list[Scored | None]:
    """The results in the rows that have a text; None in the others."""
    there = [(text, row) for text, row in zip(texts, rows, strict=True) if text is not None]
    results = iter(await _scored(reward, there))
    return [None if text is None else next(results) for text in texts]


def _games(rows: Sequence[Row], column: str | None) -> dict[str, list[str | None]]:
    answers = [answer_of(row, column) for row in rows]
    return {
        "answer_alone": answers,
        "empty": ["" for _ in rows],
        "prompt_echoed": [prompt_of(row) for row in rows],
        "answer_ten_times": [
            None if answer is None else "\n".join([answer] * _REPEATS) for answer in answers
        ],
    }


def _note(honest: defaultdict[int, list[float]], index: int, scored: Scored) -> None:
    if scored.value is not None:
        honest[index].append(scored.value)


def _judged(
    games: Mapping[str, Sequence[Scored | None]],
    honest: Mapping[int, Sequence[float]],
    least: float,
) -> dict[str, Game]:
    """Each game beside the honest answers, or the answer alone where a row has none."""
    best = {index: max(values) for index, values in honest.items()}
    for index, scored in enumerate(games.get("answer_alone", ())):
        if index not in best and scored is not None and scored.value is not None:
            best[index] = scored.value
    judged = {}
    for name, results in games.items():
        values = {
            index: scored.value
            for index, scored in enumerate(results)
            if scored is not None and scored.value is not None
        }
        as_good = sum(
            best.get(index, least) > least + _SAME and value >= best[index] - _SAME
            for index, value in values.items()
        )
        mean = math.fsum(values.values()) / len(values) if values else None
        judged[name] = Game(mean, len(values), as_good)
    return judged


def _distribution(results: Sequence[Scored]) -> Distribution | None:
    values = [scored.value for scored in results if scored.value is not None]
    if not values:
        return None
    low, high = min(values), max(values)
    mean = math.fsum(values) / len(values)
    width = (high - low) / _BINS
    bins = Counter(
        min(_BINS - 1, int((value - low) / width)) if width > 0 else 0 for value in values
    )
    return Distribution(
        values=len(values),
        minimum=low,
        mean=mean,
        maximum=high,
        std=math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)),
        histogram={f"{low + place * width:.3g}": bins[place] for place in sorted(bins)},
    )


def _groups(
    rows: Sequence[Row], real: Sequence[tuple[int, str]], results: Sequence[Scored]
) -> Groups | None:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for (index, _), scored in zip(real, results, strict=True):
        if scored.value is not None:
            groups[group_of(rows[index], index)].append(scored.value)
    several = [values for values in groups.values() if len(values) > 1]
    if not several:
        return None
    return Groups(
        count=len(several),
        all_zero=sum(all(value == 0 for value in values) for values in several),
        all_one=sum(all(value == 1 for value in values) for values in several),
        constant=sum(max(values) - min(values) <= _SAME for values in several),
    )


_MERITLESS = {
    "empty": "an empty answer",
    "prompt_echoed": "the prompt echoed",
    "answer_ten_times": "the answer ten times",
}


def _warnings(found: Trial, values: Sequence[float]) -> list[str]:
    said = []
    wrong = sum(verdict.is_ok is False for verdict in found.verdicts)
    if wrong:
        said.append(f"{wrong} of {len(found.verdicts)} cases have not the expected value.")
    if found.errors:
        count = sum(found.errors.values())
        said.append(f"{count} of {found.samples} samples have no value; a run leaves them out.")
    if len(values) > 1 and max(values) - min(values) <= _SAME:
        said.append(f"Every sample scores {values[0]:.3g}: there is nothing to learn from it.")
    for name, words in _MERITLESS.items():
        game = found.games.get(name)
        if game is not None and game.as_good:
            said.append(
                f"{words} scores as high as an honest one in {game.as_good} of {game.rows} rows."
            )
    if found.groups and found.groups.constant * 2 > found.groups.count:
        said.append(
            f"{found.groups.constant} of {found.groups.count} groups are constant and give no "
            "gradient."
        )
    return [sentence[0].upper() + sentence[1:] for sentence in said]
