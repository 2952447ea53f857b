"""Runs in lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from tinker_mcp.runs.showing.views import Change, RunSummary

HEAD = ("RUN", "NAME", "METHOD", "STATE", "STEP", "LOSS", "EVAL", "COST", "LEFT", "AGE")
_MAX_NAME_CHARACTERS = 24
_MAX_LINE_CHARACTERS = 400


def table(summaries: Sequence[RunSummary], now: float) -> str:
    """One line a run, in columns."""
    rows = [HEAD, *(cells(summary, now) for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def cells(summary: RunSummary, now: float) -> Sequence[str]:
    """What `HEAD` names."""
    return (
        summary.run_id,
        _cut(summary.name, _MAX_NAME_CHARACTERS),
        summary.method,
        state(summary),
        f"{summary.step}/{summary.steps}",
        number(summary.loss),
        held_out(summary),
        cost(summary),
        duration(summary.seconds_left),
        duration(now - summary.created_at),
    )


def run_line(summary: RunSummary) -> str:
    """How a run stands, in one line."""
    parts = [
        f"{summary.run_id} {state(summary)} at step {summary.step}/{summary.steps}",
        f"{summary.loss_metric} {number(summary.loss)}" if summary.loss is not None else "",
        f"{summary.eval.metric} {held_out(summary)}" if summary.eval else "",
        f"cost {cost(summary)}" if summary.usd else "",
        f"{duration(summary.seconds_left)} left" if summary.seconds_left else "",
        summary.detail or "",
    ]
    return one_line(", ".join(part for part in parts if part))


def change_line(change: Change) -> str:
    """Something that happened, in one line."""
    return one_line(f"[step {change.step}] {change.kind}: {change.what}")


def state(summary: RunSummary) -> str:
    return f"{summary.state} ({summary.reason})" if summary.reason else summary.state


def held_out(summary: RunSummary) -> str:
    """The held-out loss, first and last."""
    if summary.eval is None:
        return "-"
    first, last = summary.eval.first, summary.eval.last
    ends = (number(first.value), number(last.value))
    return ends[1] if first == last else " -> ".join(ends)


def cost(summary: RunSummary) -> str:
    if summary.max_usd is None and not summary.usd:
        return "-"
    limit = "" if summary.max_usd is None else f" of ${summary.max_usd:.2f}"
    return f"${summary.usd:.2f}{limit}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """As `45s`, `3m20s`, `2h05m` or `3d04h`."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def one_line(text: str) -> str:
    return _cut(" ".join(text.split()), _MAX_LINE_CHARACTERS)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 1]}…"
