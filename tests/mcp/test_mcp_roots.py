"""Which files an agent may name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from agents import TINY, in_memory

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.settings import Settings
from tinker_mcp.training.roots import allowed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside.jsonl").write_text("secret")
    return tmp_path / "root"


def test_a_path_inside_a_root_is_allowed_whether_it_exists_or_not(root: Path) -> None:
    settings = Settings(roots=(root,))
    assert allowed(str(root / "new" / "rows.jsonl"), settings) == root / "new" / "rows.jsonl"
    assert allowed(str(root), settings) == root


def test_a_relative_path_starts_at_the_first_root(root: Path, tmp_path: Path) -> None:
    assert allowed("rows.jsonl", Settings(roots=(root, tmp_path))) == root / "rows.jsonl"


@pytest.mark.parametrize(
    "path", ["../outside.jsonl", "/etc/passwd", "~", "link", "link/x", "a/../.."]
)
def test_a_path_that_leads_outside_is_refused_with_the_roots(root: Path, path: str) -> None:
    (root / "link").symlink_to(root.parent)
    with pytest.raises(InvalidInputError, match="outside the allowed folders") as caught:
        allowed(path, Settings(roots=(root,)))
    assert str(root) in str(caught.value)
    assert "--root DIR" in str(caught.value)


def test_a_name_that_only_begins_like_a_root_lies_outside(root: Path) -> None:
    with pytest.raises(InvalidInputError, match="outside"):
        allowed(str(root) + "-other/rows.jsonl", Settings(roots=(root,)))


def test_a_root_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(root)
    settings = Settings(roots=(tmp_path / "linked",))
    assert allowed("rows.jsonl", settings) == root / "rows.jsonl"


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/rows.jsonl"])
def test_what_is_no_path_is_refused(root: Path, path: str) -> None:
    with pytest.raises(InvalidInputError, match="no usable path"):
        allowed(path, Settings(roots=(root,)))


def test_the_working_directory_is_the_root_by_default() -> None:
    assert Settings.from_environment({}).roots == (Path.cwd(),)


def test_the_variable_lists_roots_and_the_option_wins(root: Path, tmp_path: Path) -> None:
    environ = {"TINKER_MCP_ROOTS": os.pathsep.join([str(root), str(tmp_path)])}
    assert Settings.from_environment(environ).roots == (root, tmp_path)
    assert Settings.from_environment(environ, roots=[str(tmp_path)]).roots == (tmp_path,)


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is no folder"):
        Settings.from_environment({}, roots=[str(tmp_path / "nowhere")])


async def test_the_tools_read_nothing_outside_the_roots(root: Path) -> None:
    outside = str(root.parent / "outside.jsonl")
    async with in_memory(Settings(roots=(root,), home=root)) as agent:
        built = await agent.error("build_datums", base_model=TINY, path=outside)
        inspected = await agent.error("inspect_dataset", path=outside)
    assert "--root DIR" in built
    assert "--root DIR" in inspected
    assert "secret" not in built + inspected
