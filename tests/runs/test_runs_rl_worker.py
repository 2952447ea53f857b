"""Reinforcement learning in a worker's process: kept on disk, killed, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from detached import completed, ended, kill, metric_lines, reached, until
from rl_runs import REWARD, SMALL, asked, rl_spec, transcripts_in

from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.planning.estimate import Estimate
from tinker_mcp.runs.planning.plan import Planned
from tinker_mcp.runs.rl_options import EnvironmentSpec
from tinker_mcp.runs.supervisor import Supervisor

TWENTY_QUESTIONS = (
    "tinker_cookbook.recipes.multiplayer_rl.twenty_questions.env:TwentyQuestionsDatasetBuilder"
)


def planned(**changes: Any) -> Planned:
    """A run of `rl_spec`."""
    train = [] if changes.get("environment") else asked()
    held_out = changes.pop("held_out", [])
    return Planned(rl_spec(**changes), train, held_out, (), Estimate("local", {}, 0.0, 0.0))


def test_a_run_is_kept_with_its_prompts_and_told_as_the_cookbook_would(
    supervisor: Supervisor, runs_home: Path
) -> None:
    from tinker_cookbook.stores.registry import _infer_training_type
    from tinker_cookbook.stores.storage import LocalStorage
    from tinker_cookbook.stores.training_store import TrainingRunStore

    run_id = supervisor.start(planned(steps=2)).run_id
    completed(supervisor, run_id, runs_home)
    folder = RunFolder.of(runs_home, run_id)
    kept = (folder.path / "data" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"]["word"] for line in kept] == ["red", "green", "blue", "black"]
    assert _infer_training_type(TrainingRunStore(LocalStorage(folder.path))) == "rl"
    assert len(transcripts_in(folder.path)) == 6


def test_a_run_killed_between_two_checkpoints_goes_on_from_the_first(
    paced: Supervisor, paced_home: Path
) -> None:
    row = paced.start(planned(steps=12, save_every=3, max_tokens=4, reward=SMALL))
    reached(paced, row.run_id, 5)
    kill(paced, row.run_id)
    until(lambda: paced.run(row.run_id).state == "crashed")
    paced.resume(row.run_id)
    completed(paced, row.run_id, paced_home)
    steps = [step for step, _ in metric_lines(paced_home, row.run_id, REWARD)]
    assert steps == list(range(1, 13))
    told = [line["step"] for line in transcripts_in(RunFolder.of(paced_home, row.run_id).path)]
    assert told == sorted(told)
    assert len(told) == 12 * 3


def test_a_run_is_stopped_with_a_checkpoint_and_resumed(
    paced: Supervisor, paced_home: Path
) -> None:
    row = paced.start(planned(steps=200, max_off_policy_steps=1))
    reached(paced, row.run_id, 2)
    paced.stop(row.run_id, save=True)
    stopped = ended(paced, row.run_id)
    assert (stopped.state, stopped.reason) == ("stopped", "user")
    paced.resume(row.run_id, steps=stopped.step + 2)
    done = completed(paced, row.run_id, paced_home)
    assert done.step == stopped.step + 2


def test_prompts_that_were_changed_are_not_trained_on(
    supervisor: Supervisor, runs_home: Path
) -> None:
    run_id = supervisor.start(planned(steps=1)).run_id
    completed(supervisor, run_id, runs_home)
    path = RunFolder.of(runs_home, run_id).path / "data" / "prompts.jsonl"
    path.write_text(path.read_text().replace("red", "rot"))
    supervisor.resume(run_id, steps=2)
    row = ended(supervisor, run_id)
    assert row.state == "failed"
    assert "was changed since the run was started" in str(row.detail)


@pytest.mark.parametrize("k", [0, 1])
def test_a_game_of_two_agents_runs_two_steps(
    supervisor: Supervisor, runs_home: Path, k: int
) -> None:
    environment = EnvironmentSpec(
        name=TWENTY_QUESTIONS, args={"answerer_base_model": "tinker-local/tiny"}
    )
    run_id = supervisor.start(
        planned(
            steps=2,
            environment=environment,
            max_off_policy_steps=k,
            batch_size=1,
            group_size=2,
            max_tokens=4,
        )
    ).run_id
    completed(supervisor, run_id, runs_home)
    turns = metric_lines(runs_home, run_id, "env/all/turns_per_episode")
    assert turns == [(1, 20.0), (2, 20.0)]
