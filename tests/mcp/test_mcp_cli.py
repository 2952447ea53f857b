"""The command line: help, errors as sentences, and the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from demo_process import run_demo
from tinker_mcp import __version__
from tinker_mcp.cli import main


def test_help_names_every_command() -> None:
    said = CliRunner().invoke(main, ["--help"]).output
    assert all(f"  {command} " in said for command in main.commands)


def test_the_version_is_the_packages() -> None:
    assert __version__ in CliRunner().invoke(main, ["--version"]).output


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_an_unknown_backend_is_refused_with_those_that_exist(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--backend", "bogus"])
    assert result.exit_code == 2
    assert "'bogus' is not one of 'auto', 'hosted', 'local'" in result.output


def test_the_demo_measures_and_its_exit_status_says_whether_it_got_better(home: Path) -> None:
    done = run_demo(home, "--json", "--steps", "8")
    result = json.loads(done.stdout)
    assert result["base_model"] == "tinker-local/tiny"
    assert result["backend"].startswith("local (127.0.0.1:")
    assert result["has_improved"] is (result["eval_loss_after"] < result["eval_loss_before"])
    assert done.returncode == (0 if result["has_improved"] else 1)
    assert result["answer_of_checkpoint"] == result["answer_after"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [(["--steps", "0"], 2, "0 is not in the range"), (["--base-model", "nope"], 1, "'nope'")],
)
def test_a_demo_that_cannot_run_says_why_in_a_sentence(
    home: Path, arguments: list[str], status: int, said: str
) -> None:
    done = run_demo(home, "--json", *arguments)
    assert done.returncode == status
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr
