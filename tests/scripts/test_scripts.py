"""Every script, as a process: its help, its dry run, two steps on the tiny model, and bad input.

FutureWarning is an error in all of them: it is how the SDK says that a method will go.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
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
BOUND_S = 120.0  # seconds of a process: 7 on an idle machine

SMALL: dict[str, list[str]] = {
    "setup_check": [],
    "supervised_training": ["--steps=2", "--batch-size=2"],
    "sampling_demo": ["--max-tokens=4"],
    "checkpoint_management": ["--steps=2"],
    "dpo_training": ["--steps=2", "--batch-size=2"],
    "rl_training": ["--steps=2", "--groups=2", "--group-size=4", "--held-out=2"],
    "custom_loss": ["--steps=2", "--batch-size=2"],
    "evaluation": ["--limit=2", "--max-tokens=4"],
    "distillation": ["--steps=2", "--teacher-steps=2", "--batch-size=2", "--max-tokens=4"],
    "prompt_distillation": ["--steps=2", "--questions=8", "--batch-size=2", "--max-tokens=4"],
    "sweep": ["--steps=2", "--batch-size=2"],
    "rlhf_pipeline": ["--sft-steps=2", "--reward-steps=2", "--rl-steps=2", "--batch-size=2"],
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
    """A state folder whose local backend runs, and serves the tiny model only."""
    folder = tmp_path_factory.mktemp("home")
    server = start_server(folder / "local")
    yield folder
    server.stop()


def _plain_environ() -> dict[str, str]:
    """Without what other tests of this process point the SDK at."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "HF_HOME"))}


def run(home: Path, script: Path, *args: str, **variables: str) -> Ended:
    """A script in a folder that is not its own, with nothing but a state folder to go by."""
    ended = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", str(script), *args],
        env={**_plain_environ(), "TINKER_MCP_HOME": str(home), **variables},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def run_tiny(home: Path, name: str, *args: str) -> Ended:
    return run(home, SCRIPTS / f"{name}.py", "--json", f"--base-model={TINY}", *args)


def checkpoints(home: Path) -> int:
    """How many the backend keeps."""
    return len(list((home / "local").rglob("adapter_model.safetensors")))


def test_every_script_is_tested() -> None:
    there = {path.stem for path in SCRIPTS.glob("[a-z]*.py")}
    assert there == {*SMALL, "reproduce_run"}


@pytest.fixture(scope="module")
def helps(home: Path) -> dict[str, str]:
    """What each script says to --help: of one process, since importing torch takes seconds."""
    every_help = """
import contextlib, io, json, runpy, sys
helps, names = {}, sys.argv[1:]
sys.path.insert(0, names[0].rpartition("/")[0])
for name in names:
    sys.argv, said = [name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(name, run_name="__main__")
    helps[name] = said.getvalue()
print(json.dumps(helps))
"""
    program = home / "every_help.py"
    program.write_text(every_help)
    found = run(home, program, *map(str, SCRIPTS.glob("[a-z]*.py"))).result
    return {Path(name).stem: said for name, said in found.items()}


@pytest.mark.parametrize("name", [*SMALL, "reproduce_run"])
def test_a_script_says_what_it_does_and_takes(helps: dict[str, str], name: str) -> None:
    assert helps[name].startswith("usage: ")
    assert all(option in helps[name] for option in ("--json", "--dry-run"))


@pytest.mark.parametrize("name", SMALL)
def test_a_dry_run_says_the_cost_and_trains_nothing(home: Path, name: str) -> None:
    ended = run_tiny(home, name, "--dry-run", *SMALL[name])

    costs = [value for key, value in ended.result.items() if key in ("usd", "usd_max")]
    assert costs == [0.0]
    assert not any("_path" in key for key in ended.result)


@pytest.mark.parametrize("name", SMALL)
def test_a_script_does_two_steps_on_the_tiny_model(home: Path, name: str) -> None:
    before = checkpoints(home)

    found = run_tiny(home, name, *SMALL[name]).result

    assert found["backend"].startswith("local")
    if name in LOSSES:
        losses = LOSSES[name](found)
        assert len(losses) == 2
        assert all(map(math.isfinite, losses))
        assert checkpoints(home) > before


def test_a_copy_elsewhere_works_too(home: Path, tmp_path: Path) -> None:
    for name in ("sampling_demo.py", "_backend.py"):
        (tmp_path / name).write_text((SCRIPTS / name).read_text())

    ended = run(home, tmp_path / "sampling_demo.py", f"--base-model={TINY}", "--json", "--dry-run")

    assert ended.result["prompts"] == 3


def test_on_another_server_an_unknown_price_is_not_called_zero(home: Path) -> None:
    note = json.loads((home / "local" / "server.json").read_text())
    script = SCRIPTS / "supervised_training.py"

    ended = run(home, script, f"--base-model={TINY}", "--json", "--dry-run", **note["env"])

    assert ended.result["backend"].startswith("hosted")
    assert ended.result["usd"] is None


BAD = {
    "no such file": ("supervised_training", ["--data=nothing.jsonl"], "nothing.jsonl"),
    "a bad row": ("dpo_training", ["--data=bad.jsonl"], "bad.jsonl"),
    "a model that is not served": ("sampling_demo", ["--base-model=other/model"], "other/model"),
    "a rate that diverges": ("custom_loss", ["--learning-rate=1"], "1.0"),
    "no such run": ("reproduce_run", ["no-such-run"], "no-such-run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_a_script_with_a_sentence(home: Path, case: str) -> None:
    name, args, named = BAD[case]
    (home / "bad.jsonl").write_text('{"messages": []}\n')

    ended = run(home, SCRIPTS / f"{name}.py", *args)

    assert ended.status == 1
    assert ended.err.startswith(f"{name}: ")
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert named in ended.err


def test_a_reproduced_run_trains_what_the_record_says(home: Path) -> None:
    datums = [sdk_datum(f"Say {word}: {word}!") for word in ("red", "green", "blue", "grey")]
    folder = RunFolder.of(home, "sft-1")
    folder.train_data.parent.mkdir(parents=True)
    positions = sum(datum.model_input.length for datum in datums)
    facts = DataFacts(
        source="colours.jsonl",
        sha256=data.save(folder.train_data, datums),
        datums=len(datums),
        tokens=positions,
        trained_tokens=positions,
    )
    folder.create(spec_of(facts), "sft-1")

    made = run(home, SCRIPTS / "reproduce_run.py", "sft-1", "--json").result
    first, second = (run(home, Path(made["out"])).result["losses"] for _ in range(2))

    assert len(first) == 2
    assert first == second  # float32, the same seed and order


def spec_of(facts: DataFacts) -> RunSpec:
    """Two steps of two datums."""
    return RunSpec(
        method="sft",
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
        save_every=0,
        eval_every=0,
        ttl_s=None,
    )
