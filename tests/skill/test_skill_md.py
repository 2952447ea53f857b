"""SKILL.md is a skill, and short."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.skill.documents import ROOT, SKILL
from tinker_mcp.server import docs


def test_it_is_valid_under_the_specification(tmp_path: Path) -> None:
    skills_ref = pytest.importorskip("skills_ref", reason="pip install -e '.[dev]'")
    folder = tmp_path / "tinker-mcp"  # the specification wants the skill's name
    folder.mkdir()
    (folder / "SKILL.md").write_bytes(SKILL.read_bytes())

    assert skills_ref.validate(folder) == []
    assert skills_ref.read_properties(folder).name == "tinker-mcp"


def test_the_wheel_carries_it_with_the_prompts() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]
    carried = hatch["build"]["targets"]["wheel"]["force-include"]
    assert all(carried[name] == f"tinker_mcp/{name}" for name in ("SKILL.md", "prompts"))


def test_it_has_fewer_than_300_lines() -> None:
    assert len(SKILL.read_text("utf-8").splitlines()) < 300


def test_its_page_begins_with_its_title_and_not_with_frontmatter() -> None:
    assert docs.page("skill").startswith("# Fine-tuning with Tinker\n")
