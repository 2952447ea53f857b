"""A metric over the steps of a run, short enough to be read, and drawn in one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tinker_mcp.store.rows import MetricRow

MAX_POINTS = 200
BLOCKS = "▁▂▃▄▅▆▇█"
NAN_MARK = "!"


@dataclass(frozen=True)
class Point:
    """A value at a step; None where it is NaN or infinite."""

    step: int
    value: float | None


@dataclass(frozen=True)
class Series:
    """A metric, cut.

    Attributes:
        points: In order of steps; first, last, lowest, highest and what is no number are kept.
        total: How many were measured.
        slope_per_100_steps: A least-squares line through the last half; None below two points.
        nan_at_step: The first step whose value is NaN or infinite.
    """

    metric: str
    points: tuple[Point, ...]
    total: int
    first: Point | None
    last: Point | None
    lowest: Point | None
    slope_per_100_steps: float | None
    nan_at_step: int | None


def metric_names(rows: Iterable[MetricRow]) -> list[str]:
    """What was measured, in order of name."""
    return sorted({name for row in rows for name in row.numbers})


def series(rows: Iterable[MetricRow], metric: str, points: int = 100) -> Series:
    """One metric of these rows, cut to `points` (200 at most)."""
    known = [_point(row, metric) for row in rows if metric in row.numbers]
    lowest = min((point for point in known if point.value is not None), key=_value, default=None)
    return Series(
        metric=metric,
        points=tuple(cut(known, min(points, MAX_POINTS))),
        total=len(known),
        first=known[0] if known else None,
        last=known[-1] if known else None,
        lowest=lowest,
        slope_per_100_steps=_slope(known[len(known) // 2 :]),
        nan_at_step=next((point.step for point in known if point.value is None), None),
    )


def cut(known: Sequence[Point], points: int) -> list[Point]:
    """At most `points` of them: the ends, the extremes, then the lowest and highest of each part.

    Where there is room for fewer, the earlier of these are kept: first, last, lowest, the first
    that is no number, highest.
    """
    if len(known) <= points:
        return list(known)
    numbers = [at for at, point in enumerate(known) if point.value is not None]
    others = (at for at, point in enumerate(known) if point.value is None)
    ends = [0, len(known) - 1, *_extremes(known, numbers)]
    ends[3:3] = [at for at in (next(others, None),) if at is not None]
    kept = set(list(dict.fromkeys(ends))[: max(points, 0)])
    parts = (points - len(kept)) // 2
    for part in range(parts):
        of_part = numbers[len(numbers) * part // parts : len(numbers) * (part + 1) // parts]
        kept.update(_extremes(known, of_part))
    return [known[at] for at in sorted(kept)]


def sparkline(values: Sequence[float | None], width: int = 40) -> str:
    """A curve in one line: eight blocks, the mean of its part each; ! where one is no number."""
    cells = min(width, len(values))
    parts = [
        values[len(values) * cell // cells : len(values) * (cell + 1) // cells]
        for cell in range(cells)
    ]
    heights = [_mean(part) for part in parts]
    finite = [height for height in heights if height is not None]
    if not finite:
        return NAN_MARK * len(heights)
    low, span = min(finite), max(finite) - min(finite)
    return "".join(NAN_MARK if height is None else _block(height, low, span) for height in heights)


def _block(height: float, low: float, span: float) -> str:
    return BLOCKS[round((height - low) / span * (len(BLOCKS) - 1)) if span else 0]


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is no number."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(numbers) / len(numbers) if len(numbers) == len(values) else None


def _point(row: MetricRow, metric: str) -> Point:
    value = row.numbers[metric]
    return Point(row.step, float(value) if math.isfinite(value) else None)


def _value(point: Point) -> float:
    return math.nan if point.value is None else point.value


def _extremes(known: Sequence[Point], at: Sequence[int]) -> list[int]:
    """Where of `at`, all numbers, the lowest and the highest value stand."""
    if not at:
        return []
    return [min(at, key=lambda i: _value(known[i])), max(at, key=lambda i: _value(known[i]))]


def _slope(points: Sequence[Point]) -> float | None:
    numbers = [point for point in points if point.value is not None]
    if len(numbers) < 2:
        return None
    middle = math.fsum(point.step for point in numbers) / len(numbers)
    mean = math.fsum(_value(point) for point in numbers) / len(numbers)
    spread = math.fsum((point.step - middle) ** 2 for point in numbers)
    rise = math.fsum((point.step - middle) * (_value(point) - mean) for point in numbers)
    return 100 * rise / spread if spread else None
