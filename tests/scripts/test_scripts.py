"""Every script: its help, its dry run, two steps on the tiny model, and bad input.

They run in one process, one after another; one that was copied has a process of its own.
FutureWarning is an error in all of them: it is how the SDK says that a method will go.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from servers import start_server
from tinker_mcp.runs import data
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.spec import DataFacts, RunSpec
from tiny_data import TINY, sdk_datum

SCRIPTS = Path(__file__).parents[2] / "scripts"
ONE_PROCESS = Path(__file__).with_name("scripts_in_one_process.py")
TINY_VL = "tinker-local/tiny-vl"
BOUND_S = 120.0  # of one script: about a second on an idle machine, 7 in a process of its own

SMALL: dict[str, list[str]] = {
    "setup_check": [],
    "supervised_training": ["--steps=2", "--batch-size=2", "--max-tokens=4"],
    "sampling_demo": ["--max-tokens=4"],
    "checkpoint_management": ["--steps=2"],
    "dpo_training": ["--steps=2", "--batch-size=2"],
    "rl_training": ["--steps=2", "--groups=2", "--group-size=4", "--eval-share=0.05"],
    "custom_loss": ["--steps=2", "--batch-size=2"],
    "evaluation": ["--limit=2", "--max-tokens=4"],
    "distillation": ["--steps=2", "--teacher-steps=2", "--batch-size=2", "--max-tokens=4"],
    "prompt_distillation": ["--steps=2", "--questions=8", "--batch-size=2", "--max-tokens=4"],
    "sweep": ["--steps=2", "--batch-size=2"],
    "rlhf_pipeline": ["--sft-steps=2", "--reward-steps=2", "--steps=2", "--batch-size=2"],
    "vision_training": [f"--base-model={TINY_VL}", "--steps=2", "--batch-size=2", "--samples=1"],
}
"""Each script, and what makes it do two steps."""

LOSSES = {
    "supervised_training": lambda found: found["losses"],
    "dpo_training": lambda found: [step["dpo_loss"] for step in found["metrics"]],
    "rl_training": lambda found: [step["reward"] for step in found["metrics"]],
    "custom_loss": lambda found: [step["focal"] for step in found["metrics"]],
    "distillation": lambda found: [step["reverse_kl"] for step in found["metrics"]],
    "prompt_distillation": lambda found: found["losses"],
    "sweep": lambda found: found["table"][0]["losses"],
    "vision_training": lambda found: found["losses"],
    "rlhf_pipeline": lambda found: found["rewards"],
}
"""Where a script that trains says how each step went."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The last line of stdout."""
        assert self.status == 0, self.err
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder whose local backend runs, and serves the tiny models only."""
    folder = tmp_path_factory.mktemp("home")
    server = start_server(folder / "local", "--model", TINY_VL)
    yield folder
    server.stop()


def _plain_environ() -> dict[str, str]:
    """Without what other tests of this process point the SDK at."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "HF_HOME"))}


def _interpreter(home: Path, *args: str | Path, **variables: str) -> dict[str, Any]:
    """A Python in a folder that no script is in, with nothing but a state folder to go by."""
    return {
        "args": [sys.executable, "-W", "error::FutureWarning", *map(str, args)],
        "env": {**_plain_environ(), "TINKER_MCP_HOME": str(home), **variables},
        "cwd": home,
        "text": True,
    }


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(home: Path) -> Iterator[Run]:
    """Runs a script, by its name in scripts/ or its path, with arguments."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(**_interpreter(home, ONE_PROCESS), **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(script: str | Path, *args: str) -> Ended:
            path = SCRIPTS / f"{script}.py" if isinstance(script, str) else script
            process.stdin.write(json.dumps([str(path), *args]) + "\n")
            process.stdin.flush()
            is_answered = bool(select.select([process.stdout], [], [], BOUND_S)[0])
            assert is_answered, f"{script} has not ended in {BOUND_S} s"
            return Ended(**json.loads(process.stdout.readline()))

        yield run
        process.kill()  # the SDK's sessions would heartbeat on


def run_tiny(run: Run, name: str, *args: str) -> Ended:
    """A script on the tiny model, for two steps if `args` do not say otherwise."""
    return run(name, "--json", f"--base-model={TINY}", *SMALL[name], *args)


def checkpoints(home: Path) -> int:
    """How many the backend keeps."""
    return len(list((home / "local").rglob("adapter_model.safetensors")))


def test_every_script_is_tested() -> None:
    there = {path.stem for path in SCRIPTS.glob("[a-z]*.py")}
    assert there == {*SMALL, "reproduce_run"}


@pytest.mark.parametrize("name", [*SMALL, "reproduce_run"])
def test_a_script_says_what_it_does_and_takes(run: Run, name: str) -> None:
    said = run(name, "--help").out

    assert said.startswith("usage: ")
    assert all(option in said for option in ("--json", "--dry-run"))


@pytest.mark.parametrize("name", SMALL)
def test_a_dry_run_says_the_cost_and_trains_nothing(home: Path, run: Run, name: str) -> None:
    before = checkpoints(home)

    found = run_tiny(run, name, "--dry-run").result

    assert [value for key, value in found.items() if key in ("usd", "usd_max")] == [0.0]
    assert not any("_path" in key for key in found)
    assert checkpoints(home) == before


@pytest.mark.parametrize("name", SMALL)
def test_a_script_does_two_steps_on_the_tiny_model(home: Path, run: Run, name: str) -> None:
    before = checkpoints(home)

    found = run_tiny(run, name).result

    assert found["backend"].startswith("local")
    if name in LOSSES:
        losses = LOSSES[name](found)
        assert len(losses) == 2
        assert all(map(math.isfinite, losses))
        assert checkpoints(home) > before


def test_supervised_training_shows_held_out_loss_and_answers_before_and_after(run: Run) -> None:
    found = run_tiny(run, "supervised_training", "--learning-rate=9e-3").result

    assert found["held_out_nll_after"] < found["held_out_nll_before"]
    assert len(found["answers"]) == 3
    assert all(answer.keys() == {"prompt", "before", "after"} for answer in found["answers"])


def test_a_dry_run_of_supervised_training_shows_what_is_trained_on(copied: Ended) -> None:
    asked, _, answered = copied.result["first_row"].partition("<|im_start|>assistant\n")

    assert "user" in asked and "⟦" not in asked
    assert answered.startswith("⟦") and answered.endswith("<|im_end|>⟧")


def test_an_evaluation_shows_the_first_answers_beside_the_reference(run: Run) -> None:
    found = run_tiny(run, "evaluation", "--show=1").result

    [row] = found["answers"]
    assert row.keys() == {"prompt", "reference", "base"}
    assert all(row.values())


def test_sums_that_measure_accuracy_are_trained_on_in_neither_order() -> None:
    problems = runpy.run_path(str(SCRIPTS / "rl_training.py"))["problems"]

    train, test = problems(9, 0.25, seed=0)

    assert len(train) + len(test) == 81
    assert not {frozenset(pair) for pair in train} & {frozenset(pair) for pair in test}


def test_a_sweep_compares_all_combinations_on_the_same_rows(run: Run) -> None:
    args = ("--steps=1", "--learning-rates", "1e-3", "1e-4", "1e-5")

    found = run_tiny(run, "sweep", *args).result

    assert sorted(row["learning_rate"] for row in found["table"]) == [1e-5, 1e-4, 1e-3]
    bits = [row["bits_a_byte"] for row in found["table"]]
    assert bits == sorted(bits)


@pytest.fixture(scope="module")
def copied(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """How a copy of a script ended, with nothing beside it, on a server that another started."""
    copy = shutil.copy(SCRIPTS / "supervised_training.py", tmp_path_factory.mktemp("elsewhere"))
    note = json.loads((home / "local" / "server.json").read_text())
    args = (f"--base-model={TINY}", "--json", "--dry-run")
    ended = subprocess.run(
        **_interpreter(home, copy, *args, **note["env"]),
        capture_output=True,
        timeout=BOUND_S,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_a_script_that_was_copied_runs_alone(copied: Ended) -> None:
    assert copied.result["steps"] == 20


def test_on_another_server_an_unknown_price_is_not_called_zero(copied: Ended) -> None:
    assert copied.result["backend"].startswith("hosted")
    assert copied.result["usd_max"] is None


BAD = {
    "no such file": ("supervised_training", ["--data=nothing.jsonl"], "nothing.jsonl"),
    "a bad row": ("dpo_training", ["--data=bad.jsonl"], "bad.jsonl"),
    "a model that is not served": ("sampling_demo", ["--base-model=other/model"], "other/model"),
    "a rate that diverges": ("custom_loss", ["--learning-rate=1"], "1.0"),
    "no such run": ("reproduce_run", ["no-such-run"], "no-such-run"),
    "a count of nothing": ("rl_training", ["--steps=0"], "--steps is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_a_script_with_a_sentence(home: Path, run: Run, case: str) -> None:
    name, args, named = BAD[case]
    (home / "bad.jsonl").write_text('{"messages": []}\n')

    ended = run(name, *args)

    assert ended.status == 1
    assert ended.err.startswith(f"{name}: ")
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert named in ended.err


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_reproduced_run_trains_what_the_record_says(home: Path, run: Run, method: str) -> None:
    datums = [sdk_datum(f"Say {word}: {word}!") for word in ("red", "green", "blue", "grey")]
    folder = RunFolder.of(home, f"{method}-1")
    folder.train_data.parent.mkdir(parents=True)
    positions = sum(datum.model_input.length for datum in datums)
    facts = DataFacts(
        source="colours.jsonl",
        sha256=data.save(folder.train_data, datums),
        datums=len(datums),
        tokens=positions,
        trained_tokens=positions,
    )
    folder.create(spec_of(method, facts), f"{method}-1")

    made = run("reproduce_run", f"{method}-1", "--json").result
    first, second = (run(Path(made["out"])).result["losses"] for _ in range(2))

    assert len(first) == 2
    assert first == second  # float32, the same seed and order
    assert first[1] < first[0]


def spec_of(method: str, facts: DataFacts) -> RunSpec:
    """Two steps of two datums, or of two pairs."""
    return RunSpec(
        method=method,
        name="colours",
        backend="local",
        base_model=TINY,
        checkpoint=None,
        renderer="qwen3_instruct",
        train_on_what="all_tokens",
        max_length=64,
        train=facts,
        held_out=None,
        steps=2,
        batch_size=2,
        learning_rate=1e-2,
        learning_rate_source="the test",
        lr_schedule="linear",
        rank=4,
        seed=0,
        beta=0.1 if method == "dpo" else None,
        save_every=0,
        eval_every=0,
        ttl_s=None,
    )
