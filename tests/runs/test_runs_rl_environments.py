"""Environments by name: which are taken, what they are given, and runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rl_runs import REWARD, an_rl_run, rl_backend_of, transcripts

from servers import LocalServer
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.policy import environments
from tinker_mcp.runs.rl_options import EnvironmentSpec
from tinker_mcp.training.backend import Backend

ARITHMETIC = "tinker_cookbook.recipes.math_rl.arithmetic_env:ArithmeticDatasetBuilder"
GUESS_NUMBER = "tinker_cookbook.recipes.multiplayer_rl.guess_number.env:GuessNumberDatasetBuilder"
ONE_GROUP = "tinker_cookbook.recipes.multiplayer_rl.guess_number.env:GuessNumberEnvGroupBuilder"


@pytest.fixture
def backend(tiny_server: LocalServer) -> Backend:
    return rl_backend_of(tiny_server)


def an_environment(name: str, **args: Any) -> EnvironmentSpec:
    return EnvironmentSpec(name=name, args=args)


async def test_a_dataset_of_the_cookbook_runs_two_steps(backend: Backend, tmp_path: Path) -> None:
    run = an_rl_run(tmp_path, steps=2, environment=an_environment(ARITHMETIC))
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert run.series("train", "env/all/total_episodes") == {1: 8, 2: 8}
    assert set(run.series("train", "env/all/correct")) == {1, 2}  # its own
    assert "What is" in transcripts(run)[0]["turns"][0]["prompt"]
    assert any("holds nothing out" in warning for warning in run.warnings())


async def test_a_game_of_several_turns_runs_two_steps(backend: Backend, tmp_path: Path) -> None:
    spec = an_environment(GUESS_NUMBER, train_fraction=0.998)  # of 1,024 numbers
    run = an_rl_run(tmp_path, steps=2, environment=spec)
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert run.series("train", "env/all/turns_per_episode") == {1: 10, 2: 10}
    assert run.series("train", REWARD) == {1: -10, 2: -10}  # no turn was in the format
    held_out = run.series("eval", f"test/{REWARD}")
    assert held_out == {0: -10, 2: -10}
    assert run.series("eval", "test/env/all/total_episodes") == {0: 3, 2: 3}
    assert run.warnings() == []


async def test_a_group_builder_is_made_anew_for_each_group(
    backend: Backend, tmp_path: Path
) -> None:
    spec = an_environment(ONE_GROUP, answer=512)
    run = an_rl_run(tmp_path, steps=1, environment=spec)
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert run.series("train", "env/all/total_episodes") == {1: 8}


@pytest.mark.parametrize(("name", "says"), [(ONE_GROUP, False), (GUESS_NUMBER, None)])
def test_a_group_builder_holds_nothing_out_and_a_dataset_says_when_it_is_made(
    name: str, says: bool | None
) -> None:
    assert environments.holds_out(an_environment(name)) is says


async def test_what_an_environment_refuses_is_told(backend: Backend, tmp_path: Path) -> None:
    spec = an_environment(ARITHMETIC, no_such_argument=1)
    run = an_rl_run(tmp_path, steps=1, environment=spec)
    with pytest.raises(InvalidInputError, match="no_such_argument"):
        await run.attempt(backend)


async def test_a_reasoning_gym_task_runs_two_steps(backend: Backend, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    spec = an_environment("reasoning_gym:basic_arithmetic", size=20)
    run = an_rl_run(tmp_path, steps=2, environment=spec)
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert run.series("train", "reward/errors") == {1: 0, 2: 0}
    assert run.series("eval", "test/env/all/total_episodes") == {0: 2, 2: 2}


VERIFIERS_ENVIRONMENT = """
import verifiers
from datasets import Dataset


def load_environment():
    rows = [{"question": f"{n} + {n} =", "answer": str(2 * n)} for n in range(8)]

    def digits(completion, answer, **_):
        return sum(c.isdigit() for c in completion[-1]["content"]) / 10

    rubric = verifiers.Rubric(funcs=[digits])
    return verifiers.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=rubric)
"""


async def test_a_verifiers_environment_runs_two_steps(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("verifiers")
    (tmp_path / "doubled_sums.py").write_text(VERIFIERS_ENVIRONMENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = an_rl_run(tmp_path, steps=2, environment=an_environment("verifiers:doubled-sums"))
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert run.series("train", "env/all/total_episodes") == {1: 8, 2: 8}


def test_an_unknown_reasoning_gym_task_names_those_that_sound_like_it() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(InvalidInputError, match="basic_arithmetic"):
        environments.check(an_environment("reasoning_gym:basic_arithmetics"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/home/mine.py:Env", "is none"),
        ("mine.py", "is none"),
        ("../mine:Env", "is none"),
        ("no_such_package.env:Env", "no installed module"),
        ("tinker_cookbook.rl.types:NoSuchEnv", "NoSuchEnv"),
        ("tinker_cookbook.rl.no_such_module:Env", "no_such_module"),
    ],
)
def test_what_is_no_environment_is_refused(name: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        environments.check(an_environment(name))


def test_a_module_that_merely_lies_on_the_path_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lying_around"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "env.py").write_text("raise SystemExit('it was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InvalidInputError, match="no installed module"):
        environments.check(an_environment("lying_around.env:Env"))


@pytest.mark.parametrize(
    ("kind", "extra"), [("verifiers", "verifiers"), ("reasoning_gym", "reasoning-gym")]
)
def test_an_environment_whose_package_is_missing_names_the_command(
    kind: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InvalidInputError) as refused:
        environments.check(an_environment(f"{kind}:anything"))
    assert f'pip install "tinker-mcp[{extra}]"' in refused.value.next_step
