"""The README says what is so; what it names is looked up in tests/skill."""

from __future__ import annotations

import re

from tests.readme_tools import README, updated

TEXT = README.read_text()


def test_the_table_of_tools_is_the_one_made_from_the_code() -> None:
    assert updated(TEXT) == TEXT, "run: python -m tests.readme_tools"


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    blocks = re.findall(r"```\n(.*?)\n```", TEXT, re.DOTALL)
    assert blocks[:2] == [
        "pip install -e . && tinker-mcp demo",
        "pip install -e '.[dev]' && pytest -n auto",
    ]
