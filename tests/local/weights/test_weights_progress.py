from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from tinker_local.errors import LocalError
from tinker_local.weights.child_process import Watch, run_watched, without_credentials
from tinker_local.weights.progress import StderrProgress, quiet_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the progress display, to be set by a test."""
    now_s = [1000.0]
    monkeypatch.setattr("tinker_local.weights.progress.time.monotonic", lambda: now_s[0])
    return now_s


def test_a_log_gets_a_line_at_most_every_two_seconds(
    now_s: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = StderrProgress()

    for second in range(6):
        now_s[0] = 1000.0 + second
        progress("downloading it", second * 10_000_000, 93_000_000)

    assert capsys.readouterr().err.splitlines() == [
        "downloading it: 0 of 93 MB",
        "downloading it: 20 of 93 MB",
        "downloading it: 40 of 93 MB",
    ]


def test_a_new_step_and_the_end_of_one_are_said_at_once(
    now_s: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = StderrProgress()

    progress("downloading it", 92_000_000, 93_000_000)
    progress("downloading it", 93_000_000, 93_000_000)
    progress("converting it", 0, None)
    progress("converting it", 0, None)

    assert capsys.readouterr() == (
        "",
        "downloading it: 92 of 93 MB\ndownloading it: 93 of 93 MB\nconverting it\n",
    )


def test_a_terminal_gets_a_bar_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = StderrProgress()

    progress("downloading it", 41_000_000, 93_000_000)
    assert "\n" not in terminal.getvalue()
    progress("downloading it", 93_000_000, 93_000_000)

    assert "━" in terminal.getvalue()
    assert terminal.getvalue().endswith(" downloading it: 93 of 93 MB\n")


def test_the_growth_of_a_folder_is_reported_until_the_command_ends(tmp_path: Path) -> None:
    said: list[tuple[str, int, int | None]] = []
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(bytes(10))"

    run_watched(
        [sys.executable, "-c", code, str(tmp_path / "file")],
        os.environ,
        Watch("writing", tmp_path, total_bytes=10),
        lambda *call: said.append(call),
    )

    assert said[0] == ("writing", 0, 10)
    assert said[-1] == ("writing", 10, 10)


def test_the_last_line_of_a_failed_command_is_its_reason() -> None:
    code = "import sys; sys.exit('looking\\nno index at https://me:pw@host/simple\\n')"

    result = run_watched([sys.executable, "-c", code], os.environ, Watch("trying"), quiet_progress)

    assert result.returncode == 1
    assert result.last_line == "no index at https://host/simple"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://user:pa@ss@host/simple/", "https://host/simple/"),
        ("https://token@host, http://host2", "https://host, http://host2"),
        ("see https://host/a@b", "see https://host/a@b"),
    ],
)
def test_credentials_are_taken_out_of_urls(text: str, redacted: str) -> None:
    assert without_credentials(text) == redacted


def test_an_error_reads_as_problem_and_next_step() -> None:
    error = LocalError("It is empty.", "Fill it.")

    assert (error.problem, error.next_step) == ("It is empty.", "Fill it.")
    assert str(error) == "It is empty. Fill it."
