"""The outside of a jail: starts it, asks it, believes nothing it says, and ends it.

A jail is a process of its own that lives as long as its reward. It is asked over pipes, with
JSON. A sample in whose scoring it ends, is silent too long or answers what is no answer is told as
an error, and the next sample meets a new process.

Blocking; `pool.py` calls it from threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.rewards.cell import Cell, CellLostError, Limits, Program
from tinker_mcp.training.rewards.contract import Row, Scored

_MAX_ANSWER_BYTES = 4096  # and as much again for each sample
_MAX_SHOWN = 300


@dataclass(frozen=True)
class Held:
    """Which isolations hold, as the process inside found on its way in."""

    network: bool = False
    files: bool = False
    memory: bool = False
    processes: bool = False

    @property
    def is_enough(self) -> bool:
        """Whether foreign code may run; there is no half of a jail."""
        return all(vars(self).values())

    def __str__(self) -> str:
        held = [name for name, holds in vars(self).items() if holds]
        missing = [name for name, holds in vars(self).items() if not holds]
        told = f"jail: {', '.join(held) or 'nothing holds'}"
        return f"{told}; missing: {', '.join(missing)}" if missing else told


@dataclass(frozen=True)
class Sample:
    """One request: several completions only where the reward wants whole batches."""

    completions: tuple[str, ...]
    rows: tuple[Row, ...]


class Jail:
    """A program in a process of its own, started when it is first asked and again when it died."""

    def __init__(self, program: Program, limits: Limits, *, allow_unjailed: bool = False) -> None:
        self._program = program
        self._limits = limits
        self._allow_unjailed = allow_unjailed
        self._cell: Cell | None = None
        self._next_id = 0
        self._is_closed = False
        self._asking = threading.Lock()
        self.is_batch = False
        self.held = Held()

    def open(self) -> None:
        """Start it and load the program.

        Raises:
            InvalidInputError: The program cannot be loaded, or too little isolates it here.
        """
        try:
            with self._in_use():
                self._opened()
        except CellLostError as error:
            raise InvalidInputError(
                f"The reward {self._program.name} cannot be used: {error}.",
                next_step="Mend it, then call test_reward.",
            ) from error

    def score(self, samples: Sequence[Sample]) -> list[list[Scored]]:
        """The results of each sample, in order. Never raises for what the program does."""
        with self._in_use():
            return self._score(samples)

    def _score(self, samples: Sequence[Sample]) -> list[list[Scored]]:
        found: list[list[Scored]] = []
        is_retry = False
        while len(found) < len(samples):
            left = samples[len(found) :]
            try:
                cell = self._opened()
            except CellLostError as error:
                return found + [_failed(sample, str(error)) for sample in left]
            why = self._ask(cell, left, found)
            if why is None:
                break
            cell.close()
            # Another sample may have left a trap behind; a process that has seen no other tells.
            if cell.served == 0 or is_retry:
                found.append(_failed(samples[len(found)], why))
                is_retry = False
            else:
                is_retry = True
        return found

    def close(self) -> None:
        """End the process; nobody may be asking it."""
        self._is_closed = True
        if self._cell is not None:
            self._cell.close()

    def abort(self) -> None:
        """End the process while another thread asks it, or before one does: its asking fails."""
        self._is_closed = True
        if self._cell is not None:
            self._cell.kill()
        if self._asking.acquire(blocking=False):
            self.close()
            self._asking.release()

    def _ask(self, cell: Cell, samples: Sequence[Sample], found: list[list[Scored]]) -> str | None:
        """Add results to `found` until all are there, or say why the cell is of no more use."""
        first_id = self._next_id
        self._next_id += len(samples)
        try:
            cell.expect_silence()
            for index, sample in enumerate(samples):
                request = {"id": first_id + index, **vars(sample)}
                cell.send(request)
            for index, sample in enumerate(samples):
                count = len(sample.completions)
                answer = cell.receive(self._limits.wall_s, _MAX_ANSWER_BYTES * (count + 1))
                found.append(_checked(answer, first_id + index, count))
                cell.served += 1
        except CellLostError as error:
            return str(error)
        return None

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        """Descriptors are closed by the thread that waits for them, never under it."""
        with self._asking:
            try:
                yield
            finally:
                if self._is_closed and self._cell is not None:
                    self._cell.close()

    def _opened(self) -> Cell:
        """The live cell, or a new one."""
        if self._is_closed:
            raise CellLostError("its jail was closed")
        if self._cell is not None and not self._cell.is_closed:
            return self._cell
        try:
            self._cell = cell = Cell(self._program, self._limits)
        except OSError as error:  # no more descriptors or processes, say
            raise CellLostError(f"its jail cannot be started: {clean(error)}") from error
        try:
            self._load(cell)
        except BaseException:
            cell.close()
            raise
        return cell

    def _load(self, cell: Cell) -> None:
        hello = cell.receive(self._limits.start_s, _MAX_ANSWER_BYTES)
        self.held = _held(hello)
        if not self.held.is_enough and not self._allow_unjailed:
            raise InvalidInputError(
                f"This machine cannot isolate foreign code ({self.held}), so "
                f"{self._program.name} is not run.",
                next_step="Use a built-in reward that runs no code (exact_match, number, length), "
                "or ask the user for Linux 6.2 or later with Landlock and seccomp, or to set "
                "TINKER_MCP_ALLOW_UNJAILED=1 if the code is trusted.",
            )
        cell.send(self._program.as_json())
        loaded = cell.receive(self._limits.start_s, _MAX_ANSWER_BYTES)
        if "error" in loaded:
            raise CellLostError(clean(loaded["error"]))
        self.is_batch = loaded.get("is_batch") is True


def clean(text: object) -> str:
    """A sentence from inside, fit to be shown: one line, without control characters, cut."""
    shown = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * _MAX_SHOWN])
    return " ".join(shown.split())[:_MAX_SHOWN]


def _checked(answer: dict[str, Any], request_id: int, count: int) -> list[Scored]:
    """The results of an answer.

    Raises:
        CellLostError: It is none to this request.
    """
    results = answer.get("results")
    if answer.get("id") != request_id or not isinstance(results, list) or len(results) != count:
        raise CellLostError("it answered what it was not asked")
    return [_scored(result) for result in results]


def _scored(result: object) -> Scored:
    if isinstance(result, dict):
        return Scored.failed(clean(result.get("error")))
    return Scored.of(result)


def _failed(sample: Sample, why: str) -> list[Scored]:
    return [Scored.failed(why)] * len(sample.completions)


def _held(hello: dict[str, Any]) -> Held:
    held = hello.get("held")
    names = Held.__dataclass_fields__
    return Held(**{name: isinstance(held, dict) and held.get(name) is True for name in names})
