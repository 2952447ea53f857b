"""The command line: help, errors as sentences, and the demo."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

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


@pytest.mark.parametrize(
    "given", [["--host", "127.0.0.1"], ["--port", "8000"], ["--port", "0"], ["--allowed-host", "x"]]
)
def test_an_address_without_http_is_refused_with_the_remedy(given: list[str]) -> None:
    result = CliRunner().invoke(main, ["serve", *given])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"Error: {given[0]} does nothing over stdio."
        f" Add --http to serve over HTTP, or leave {given[0]} out.\n"
    )


async def test_roots_on_the_command_line_come_before_those_of_the_environment(
    home: Path, tmp_path: Path
) -> None:
    roots = [tmp_path / name for name in ("one", "two", "three")]
    for root in roots:
        root.mkdir()
        (root / "rows.jsonl").write_text('{"messages": []}\n')
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-m", "tinker_mcp", "serve", "--root", str(roots[0]), "--root", str(roots[1])],
        env={**os.environ, "TINKER_MCP_HOME": str(home), "TINKER_MCP_ROOTS": str(roots[2])},
    )
    said = []
    async with Client(stdio_client(parameters)) as client:
        for root in roots:
            arguments = {"path": str(root / "rows.jsonl")}
            reply = await client.call_tool("inspect_dataset", arguments)
            said.append(getattr(reply.content[0], "text", ""))
    assert ["outside the allowed folders" in text for text in said] == [False, False, True]


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
