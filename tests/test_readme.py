"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tinker_local.cli
import tinker_mcp.cli
from tests.readme_tools import README, updated

ROOT = README.parent
TEXT = README.read_text()


def test_the_table_of_tools_is_the_one_made_from_the_code() -> None:
    assert updated(TEXT) == TEXT, "run: python -m tests.readme_tools"


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    blocks = re.findall(r"```\n(.*?)\n```", TEXT, re.DOTALL)
    assert blocks[:2] == [
        "pip install -e . && tinker-mcp demo",
        "pip install -e '.[dev]' && pytest -n auto",
    ]


@pytest.mark.parametrize("group", [tinker_mcp.cli.main, tinker_local.cli.main])
def test_every_subcommand_and_option_that_is_named_exists(group: object) -> None:
    commands = group.commands  # type: ignore[attr-defined]
    program = "tinker-mcp" if group is tinker_mcp.cli.main else "tinker-local"
    named = set(re.findall(rf"`?{program} (\w+)", TEXT))
    assert named
    assert named <= set(commands)


def test_every_source_folder_that_is_named_exists() -> None:
    named = re.findall(r"^(src/\w+|tests)/ ", TEXT, re.MULTILINE)
    assert len(named) == 3
    assert all((ROOT / folder).is_dir() for folder in named)


def test_every_environment_variable_that_is_named_is_read_somewhere() -> None:
    source = "".join(file.read_text() for file in Path(ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"`(TINKER_[A-Z_]+)`", TEXT))
    assert named
    assert {name for name in named if name not in source} == set()
