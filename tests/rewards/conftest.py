"""Jails for one test: each is ended when the test is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinker_mcp.training.rewards.cell import Limits, Program
from tinker_mcp.training.rewards.jail import Jail

OpenJail = Callable[..., Jail]


@pytest.fixture
def jailed(tmp_path: Path) -> Iterator[OpenJail]:
    """Writes a reward file and opens a jail around it."""
    opened: list[Jail] = []

    def start(source: str, **limits: float) -> Jail:
        file = tmp_path / "reward.py"
        file.write_text(source)
        program = Program("file", str(file), source, tmp_path)
        jail = Jail(program, Limits(**{"wall_s": 2.0, **limits}))  # type: ignore[arg-type]
        opened.append(jail)
        jail.open()
        return jail

    yield start
    for jail in opened:
        jail.close()
