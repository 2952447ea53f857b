"""The commands for runs, on a store that is written by hand, and one story on a real run."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from detached import planned
from rich.console import Console
from stored_runs import LEASE, StoredRun

from tinker_mcp.cli import lines, main, watching
from tinker_mcp.runs.showing.views import summary
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings
from tinker_mcp.store.runs import RunStore

BOUND_S = 60.0
Acts = Callable[..., None]
COMMANDS = ("runs", "wait", "logs", "stop", "resume", "watch")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_MCP_HOME", str(tmp_path))


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    return StoredRun(tmp_path)


def say(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def between_looks(monkeypatch: pytest.MonkeyPatch) -> Acts:
    """Has a command find something new at each look: where it would sleep, the next act happens."""

    def give(*acts: Callable[[], None]) -> None:
        to_come = deque(acts)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda s: to_come.popleft()() if to_come else sleep(s))

    return give


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = say(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) <= 30


@pytest.mark.parametrize("stored", [[], ["sft-1"]], ids=["without a store", "with a store"])
@pytest.mark.parametrize("command", COMMANDS[1:])
def test_a_run_that_does_not_exist_is_a_sentence(
    command: str, stored: list[str], tmp_path: Path
) -> None:
    for run_id in stored:
        StoredRun(tmp_path, run_id)
    result = say(command, "sft-9")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: No run 'sft-9'; ")
    assert len(result.stderr.splitlines()) == 1


def test_no_runs_yet_is_no_error_and_makes_no_store(tmp_path: Path) -> None:
    result = say("runs")
    assert (result.exit_code, result.output) == (
        0,
        "No runs yet; an agent starts one with start_run.\n",
    )
    assert json.loads(say("runs", "--json").output) == []
    assert say("watch").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_runs_are_listed_in_columns(run: StoredRun, tmp_path: Path) -> None:
    run.evaluate(0, 3.0)
    run.train(3.0, 1.25)
    run.evaluate(2, 1.5)
    StoredRun(tmp_path, "dpo-1", name="likes", method="dpo", beta=0.1, max_usd=2.0)
    head, second, first = say("runs").output.splitlines()
    assert head.split() == [
        *["RUN", "NAME", "METHOD", "STATE", "STEP", "LOSS", "EVAL", "COST", "LEFT", "AGE"]
    ]
    assert first.split()[:10] == [
        *["sft-1", "colours", "sft", "running", "2/100", "1.25", "3", "->", "1.5", "-"]
    ]
    assert second.split()[:9] == [
        *["dpo-1", "likes", "dpo", "running", "0/100", "-", "-", "$0.00", "of"]
    ]


def test_only_the_newest_runs_are_listed_unless_all_are_asked_for(tmp_path: Path) -> None:
    for n in range(12):
        StoredRun(tmp_path, f"sft-{n}")
    shown = say("runs").output.splitlines()
    assert len(shown) == 12
    assert shown[-1] == "2 more: tinker-mcp runs --all"
    assert len(say("runs", "--all").output.splitlines()) == 13
    assert len(json.loads(say("runs", "--json", "--all").output)) == 12


def test_runs_as_json_hold_the_whole_summary(run: StoredRun) -> None:
    run.train(3.0, float("nan"))
    run.checkpoint(2)
    (told,) = json.loads(say("runs", "--json").output)
    assert (told["run_id"], told["state"], told["step"], told["loss"]) == (
        "sft-1",
        "running",
        2,
        None,
    )
    assert told["checkpoints"][0]["state_path"] == "tinker://a/weights/000002"


def test_a_crashed_run_is_listed_as_crashed(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 11.0)
    assert " crashed " in say("runs").output


@pytest.mark.parametrize("named", ["sft-1", "sft", "s", "colours"])
def test_a_run_is_named_by_id_beginning_or_name(run: StoredRun, named: str) -> None:
    run.move("completed")
    result = say("wait", named)
    assert result.exit_code == 0
    assert result.output.startswith("sft-1 completed at step 0/100")


def test_a_beginning_of_several_runs_names_them(run: StoredRun, tmp_path: Path) -> None:
    StoredRun(tmp_path, "sft-2", name="shapes")
    result = say("wait", "sft")
    assert result.exit_code == 1
    assert result.stderr == "Error: 2 runs fit: sft-2, sft-1. Name one by its id.\n"
    assert "2 runs fit" in say("wait").stderr  # and both are active


def test_an_id_comes_before_the_beginning_of_another(run: StoredRun, tmp_path: Path) -> None:
    StoredRun(tmp_path, "sft-11")
    run.move("completed")
    assert say("wait", "sft-1").exit_code == 0


def test_without_a_name_the_one_active_run_is_meant(run: StoredRun, tmp_path: Path) -> None:
    StoredRun(tmp_path, "sft-2").move("completed")
    result = say("wait", "--timeout-s", "0")
    assert result.exit_code == 3
    assert result.output.startswith("sft-1 running at step 0/100")
    run.move("completed")
    assert "No active run; the newest: sft-2, sft-1." in say("wait").stderr


@pytest.mark.parametrize(
    ("state", "reason", "status"),
    [
        ("completed", None, 0),
        ("failed", None, 1),
        ("stopped", "user", 1),
        ("stopped", "budget", 1),
        ("stopped", "divergence", 1),
    ],
)
def test_the_exit_status_of_wait_says_how_it_ended(
    run: StoredRun, state: str, reason: str | None, status: int
) -> None:
    run.move(state, reason, "That is why.")
    result = say("wait", "sft-1")
    assert result.exit_code == status
    assert "That is why." in result.output


def test_wait_tells_what_happens_and_ends_with_the_run(run: StoredRun, between_looks: Acts) -> None:
    between_looks(
        lambda: run.train(3.0, 2.0),
        lambda: run.evaluate(2, 1.5),
        lambda: run.move("completed"),
    )
    result = say("wait", "sft-1", "--timeout-s", str(BOUND_S))
    assert result.exit_code == 0
    assert "[step 2] eval: test/nll 1.5" in result.output
    last = result.output.splitlines()[-1]
    assert last.startswith("sft-1 completed at step 2/100, train_mean_nll 2, test/nll 1.5")


@pytest.mark.parametrize("until", ["eval", "step=2"])
def test_wait_ends_when_what_it_waits_for_has_happened(
    run: StoredRun, until: str, between_looks: Acts
) -> None:
    between_looks(lambda: run.train(3.0, 2.0), lambda: run.evaluate(2, 1.5))
    result = say("wait", "sft-1", "--until", until, "--timeout-s", str(BOUND_S))
    assert result.exit_code == 0
    assert "running at step 2/100" in result.output.splitlines()[-1]


def test_wait_until_something_unknown_is_a_sentence(run: StoredRun) -> None:
    result = say("wait", "sft-1", "--until", "soon")
    assert result.exit_code == 1
    assert "Use completed, eval, or step=30." in result.stderr


def test_wait_as_json_prints_one_object(run: StoredRun) -> None:
    run.move("failed", detail="The backend refused step 3.")
    result = say("wait", "--json", "sft-1")
    assert result.exit_code == 1
    assert json.loads(result.output)["detail"] == "The backend refused step 3."


def test_logs_show_the_end_without_secrets(run: StoredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "must-not-be-seen")
    run.folder.log.write_text("".join(f"line {n}\n" for n in range(50)) + "a must-not-be-seen b\n")
    shown = say("logs", "sft-1").output.splitlines()
    assert (len(shown), shown[0]) == (20, "line 31")
    assert shown[-1] == "a [hidden] b"
    assert say("logs", "-n", "2", "sft-1").output == "line 49\na [hidden] b\n"


def test_a_run_without_a_log_has_no_lines(run: StoredRun) -> None:
    result = say("logs", "sft-1")
    assert (result.exit_code, result.output) == (0, "")


def test_followed_logs_end_with_the_run(run: StoredRun, between_looks: Acts) -> None:
    run.folder.log.write_text("first\n")

    def write(text: str) -> None:
        with run.folder.log.open("a") as file:
            file.write(text)

    between_looks(
        lambda: write("second\nthi"), lambda: write("rd\nlast"), lambda: run.move("completed")
    )
    result = say("logs", "-f", "sft-1")
    assert result.output == "first\nsecond\nthird\nlast\n"


@pytest.mark.parametrize(("flags", "asked"), [([], "save"), (["--no-save"], "drop")])
def test_stop_asks_the_worker_to_stop(run: StoredRun, flags: list[str], asked: str) -> None:
    result = say("stop", "sft-1", *flags)
    assert result.exit_code == 0
    assert "tinker-mcp wait sft-1" in result.output
    with RunStore(run.home) as store:
        assert store.get("sft-1").stop_asked == asked


def test_stop_of_an_ended_run_says_so(run: StoredRun) -> None:
    run.move("completed")
    result = say("stop", "sft-1")
    assert (result.exit_code, result.output) == (0, "sft-1 has ended: completed, at step 0.\n")


def test_stop_ends_a_crashed_run(run: StoredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 11.0)
    assert json.loads(say("stop", "sft-1", "--json").output)["state"] == "stopped"


def test_a_run_at_work_is_not_resumed(run: StoredRun) -> None:
    result = say("resume", "sft-1")
    assert result.exit_code == 1
    assert "sft-1 is running" in result.stderr
    with RunStore(run.home) as store:
        assert store.get("sft-1").lease == LEASE


def test_a_run_of_the_hosted_service_is_not_resumed_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no stored key
    StoredRun(tmp_path, backend="hosted", max_usd=2.0).move("failed", detail="No answer.")
    result = say("resume", "sft-1")
    assert result.exit_code == 1
    assert result.stderr.endswith("which needs a key. Set TINKER_API_KEY.\n")


def test_watch_prints_lines_where_there_is_no_terminal(run: StoredRun, between_looks: Acts) -> None:
    run.train(3.0)
    between_looks(
        lambda: run.train(2.0, first=2),
        lambda: run.evaluate(2, 1.5),
        lambda: run.warn("Disk is full."),
        lambda: run.move("completed"),
    )
    result = say("watch")
    assert result.exit_code == 0
    told = result.output.splitlines()
    assert told[0].startswith("sft-1 running at step 1/100, train_mean_nll 3")
    assert "[step 2] eval: test/nll 1.5" in told
    assert "[step 2] warning: Disk is full." in told
    assert told[-1].startswith("sft-1 completed at step 2/100")
    assert len(told) <= 6


@pytest.mark.parametrize(
    ("command", "status"), [(["wait"], 130), (["logs", "-f"], 0), (["watch"], 0)]
)
def test_ctrl_c_ends_a_command_without_a_word_and_leaves_the_run_alone(
    run: StoredRun, between_looks: Acts, command: list[str], status: int
) -> None:
    def press() -> None:
        raise KeyboardInterrupt

    between_looks(press)
    result = say(*command, "sft-1")
    assert result.exit_code == status
    assert result.stderr == ""
    with RunStore(run.home) as store:
        assert store.get("sft-1").stop_asked is None


def test_watch_of_all_runs_names_each_and_ends_with_the_last(
    tmp_path: Path, between_looks: Acts
) -> None:
    both = [StoredRun(tmp_path, f"sft-{n}") for n in (1, 2)]
    between_looks(*(lambda run=run: run.move("completed") for run in both))  # type: ignore[misc]
    told = say("watch").output.splitlines()
    assert {"sft-1 [step 0] state: completed", "sft-2 [step 0] state: completed"} <= set(told)


def test_the_picture_of_a_run_has_its_curve(run: StoredRun) -> None:
    run.train(*(8.0 - n for n in range(8)))
    run.train(float("nan"), first=9)
    run.checkpoint(5)
    run.warn("Loss is NaN.")
    console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with RunStore(run.home) as store, console.file:
        console.print(watching.picture(store, [store.get("sft-1")], "sft-1", 80))
    text = console.export_text()
    assert "█▇▆▅▄▃▂▁! no number" in text
    assert f"{'━' * 5}{'─' * 55}\n" in text  # 9 of 100 steps, on a line of its own
    assert "running  step 9/100" in text
    assert "last checkpoint: step 5" in text
    assert "Loss is NaN." in text
    assert len(text.splitlines()) <= 10


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_a_picture_is_never_wider_than_the_terminal(run: StoredRun, columns: int) -> None:
    run.train(*(1.0 / n for n in range(1, 200)))
    run.evaluate(100, 1.0)
    for run_id in ("sft-1", None):
        console = Console(record=True, width=columns, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
        with RunStore(run.home) as store, console.file:
            console.print(watching.picture(store, [store.get("sft-1")], run_id, columns))
        assert all(len(line) <= columns for line in console.export_text().splitlines())


def test_a_line_of_a_run_is_one_line_however_long_its_detail_is(run: StoredRun) -> None:
    run.move("failed", detail="It\nfailed. " * 500)
    with RunStore(run.home) as store:
        line = lines.run_line(summary(store, store.get("sft-1")))
    assert "\n" not in line
    assert len(line) <= 400


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (273600, "3d04h")],
)
def test_a_duration(seconds: float | None, text: str) -> None:
    assert lines.duration(seconds) == text


def test_watch_on_a_terminal_draws_until_ctrl_c_which_leaves_the_run_alone(run: StoredRun) -> None:
    run.train(3.0, 2.0, 1.0)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tinker_mcp", "watch", "sft-1"]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        drawn = read_until(ours, "█")
        process.send_signal(2)
        assert process.wait(BOUND_S) == 0
        drawn += read_until(ours, "\0")
    os.close(ours)
    assert "Traceback" not in drawn
    assert "train_mean_nll" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn)
    with RunStore(run.home) as store:
        assert store.get("sft-1").stop_asked is None


def read_until(descriptor: int, text: str) -> str:
    """What a terminal shows, until it shows `text` or its program has ended."""
    shown = b""
    deadline = time.monotonic() + BOUND_S
    while text.encode() not in shown and time.monotonic() < deadline:
        if not select.select([descriptor], [], [], 1.0)[0]:
            continue
        try:
            shown += os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            break
    return shown.decode(errors="replace")


def test_a_real_run_is_waited_for_stopped_and_resumed(
    runs_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_MCP_HOME", str(runs_home))
    run_id = Supervisor(Settings(home=runs_home)).start(planned(steps=400)).run_id
    reached = say("wait", run_id, "--until", "step=1", "--timeout-s", str(BOUND_S))
    assert reached.exit_code == 0, reached.output
    assert say("stop", run_id).exit_code == 0
    stopped = say("wait", run_id, "--timeout-s", str(BOUND_S), "--json")
    assert stopped.exit_code == 1
    told = json.loads(stopped.stdout)
    assert (told["state"], told["reason"]) == ("stopped", "user")
    assert told["checkpoints"][-1]["step"] == told["step"]
    resumed = say("resume", run_id)
    assert resumed.stdout.startswith(f"{run_id} goes on after step {told['step']}.")
    further = say("wait", run_id, "--until", f"step={told['step'] + 1}", "--timeout-s", "60")
    assert further.exit_code == 0, further.output
    assert "worker" in say("logs", run_id, "-n", "1000").output
    assert say("stop", run_id, "--no-save").exit_code == 0
    assert say("wait", run_id, "--timeout-s", str(BOUND_S)).exit_code == 1
