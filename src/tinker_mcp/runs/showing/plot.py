"""The loss curve of a run as a small PNG: lines and labels, drawn with Pillow.

Pillow is here already (tinker-cookbook needs it) and loads in 60 ms; matplotlib would be another
30 MB and the best part of a second.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Point: TypeAlias = tuple[int, float]
"""A step and a value there, NaN and infinities included."""

SIZE = (800, 440)  # pixels
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 34, 20, 40
_COLOURS = ("#4a78c8", "#e07a1f", "#3f9b5c", "#a24ba0")
_INK, _GRID = "#333333", "#dddddd"
_LOG_FROM = 20.0  # the highest value over the lowest, from which on a log scale shows more


@dataclass(frozen=True)
class _Scale:
    """From numbers to pixels."""

    lowest: float
    highest: float
    begin: int
    end: int
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (self._bent(v) for v in (self.lowest, self.highest, value))
        return self.begin + (self.end - self.begin) * (at - low) / (high - low)

    def ticks(self, count: int = 5) -> list[float]:
        """Evenly spaced on paper, the ends among them."""
        low, high = self._bent(self.lowest), self._bent(self.highest)
        places = [low + (high - low) * i / (count - 1) for i in range(count)]
        return [math.exp(place) for place in places] if self.is_log else places

    def _bent(self, value: float) -> float:
        return math.log(value) if self.is_log else value


def curves_png(curves: Mapping[str, Sequence[Point]], title: str) -> bytes:
    """Draw curves by name over their steps.

    Values that are not finite are left out; a red line stands where the first of them is. The
    scale is logarithmic where all values are positive and the highest is 20 times the lowest.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    draw.text((_LEFT, 10), title, fill=_INK)
    points = [point for curve in curves.values() for point in curve]
    values = [value for _, value in points if math.isfinite(value)]
    if values:
        across, up = _across([step for step, _ in points]), _up(values)
        _axes(draw, across, up)
        for number, (name, curve) in enumerate(curves.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            _curve(draw, [(across(s), up(v)) for s, v in curve if math.isfinite(v)], colour)
            _label(draw, name, colour, _TOP + 14 + 16 * number)
        broken = next((step for step, value in points if not math.isfinite(value)), None)
        if broken is not None:
            draw.line((across(broken), _TOP, across(broken), SIZE[1] - _BOTTOM), fill="red")
            draw.text((max(_LEFT, across(broken) - 70), _TOP + 60), f"NaN at {broken}", fill="red")
    else:
        draw.text((_LEFT, SIZE[1] // 2), "No finite value yet.", fill=_INK)
    buffer = io.BytesIO()
    image.quantize(32).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _across(steps: Sequence[int]) -> _Scale:
    first = min(steps)
    return _Scale(first, max(*steps, first + 1), _LEFT, SIZE[0] - _RIGHT)


def _up(values: Sequence[float]) -> _Scale:
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > _LOG_FROM
    if low == high:
        low, high = low - 0.5, high + 0.5
    return _Scale(low, high, SIZE[1] - _BOTTOM, _TOP, is_log)


def _axes(draw: ImageDraw, across: _Scale, up: _Scale) -> None:
    for value in up.ticks():
        y = up(value)
        draw.line((_LEFT, y, SIZE[0] - _RIGHT, y), fill=_GRID)
        draw.text((8, y - 6), f"{value:.4g}", fill=_INK)
    for step in sorted({round(step) for step in across.ticks()}):
        draw.text((across(step) - 8, SIZE[1] - _BOTTOM + 8), str(step), fill=_INK)
    draw.text((SIZE[0] // 2 - 10, SIZE[1] - 18), "step", fill=_INK)
    if up.is_log:
        draw.text((8, 10), "log scale", fill=_INK)


def _label(draw: ImageDraw, name: str, colour: str, y: int) -> None:
    draw.line((SIZE[0] - 190, y, SIZE[0] - 170, y), fill=colour, width=3)
    draw.text((SIZE[0] - 164, y - 6), name, fill=colour)


def _curve(draw: ImageDraw, places: Iterable[tuple[float, float]], colour: str) -> None:
    places = list(places)
    draw.line(places, fill=colour, width=2)
    if len(places) <= 40:  # few enough that each can be told from the next
        for x, y in places:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
