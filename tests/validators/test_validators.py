"""The conformance suite, the Inspector and mcpb, where Node is present."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.validators import node
from tests.validators.conformance import EXTENSIONS, SKILLS
from tests.validators.inspector import CHECKS

BOUND_S = 240  # two minutes on two busy cores, once the packages are there


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `python -m tests.validators` found; a process of its own, for its warnings and logs."""
    try:
        node.toolchain()
    except node.NodeMissingError as error:
        if os.environ.get("TINKER_MCP_VALIDATORS") == "required":
            raise
        pytest.skip(f"the validators run on Node: {error}")
    results = tmp_path_factory.mktemp("validators") / "results.json"
    command = [sys.executable, "-m", "tests.validators", "--json", str(results)]
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        command, cwd=root, check=False, capture_output=True, text=True, timeout=BOUND_S
    )
    assert results.exists(), ran.stderr
    found: list[dict[str, Any]] = json.loads(results.read_text())
    return found


def of_run(rows: list[dict[str, Any]], run: str) -> dict[str, dict[str, str]]:
    """The failures of each scenario that counts."""
    return {row["name"]: row["failures"] for row in rows if row["run"] == run and row["counts"]}


@pytest.mark.timeout(600)  # npm may have to fetch the packages
@pytest.mark.parametrize(("revision", "scenarios"), [("2025-11-25", 9), ("2026-07-28", 10)])
def test_the_server_as_it_is_conforms_to(
    rows: list[dict[str, Any]], revision: str, scenarios: int
) -> None:
    found = of_run(rows, f"{revision} as it is")
    assert {name: failures for name, failures in found.items() if failures} == {}
    assert len(found) == scenarios


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("revision", "scenarios"), [("2025-11-25", 30), ("2026-07-28", 37)])
def test_with_the_fixtures_of_the_suite_it_conforms_in_all_to(
    rows: list[dict[str, Any]], revision: str, scenarios: int
) -> None:
    found = of_run(rows, f"{revision} with fixtures")
    assert {name: failures for name, failures in found.items() if failures} == {}
    assert len(found) == scenarios


@pytest.mark.timeout(600)
def test_the_skill_over_mcp_conforms_to_its_extension(rows: list[dict[str, Any]]) -> None:
    assert of_run(rows, EXTENSIONS) == {name: {} for name in SKILLS}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["stdio", "http"])
@pytest.mark.parametrize("check", CHECKS)
def test_the_inspector_has_no_error_to_report_of(
    rows: list[dict[str, Any]], check: str, transport: str
) -> None:
    assert of_run(rows, "inspector")[f"{check} on {transport}"] == {}


@pytest.mark.timeout(600)
def test_the_bundle_is_valid_and_holds_the_package_and_its_skill_alone(
    rows: list[dict[str, Any]],
) -> None:
    assert of_run(rows, "mcpb") == {"validate": {}, "pack": {}}
    packed = next(row for row in rows if row["name"] == "pack")
    tops = {name.split("/")[0] for name in packed["files"]}
    files = {"manifest.json", "pyproject.toml", "README.md", "LICENSE", "SKILL.md"}
    assert tops == files | {"prompts", "scripts", "src"}
    assert packed["size_bytes"] < 1_000_000
