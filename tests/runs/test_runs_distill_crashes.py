"""A distillation that is killed and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from detached import completed, kill, metric_lines, reached, until
from distill_runs import a_planned_distillation, a_teacher, asked, distill_backend_of

from servers import LocalServer
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.policy import teacher
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.store.runs import RunStore

PROMPTS = 300  # some seconds of answers on the paced backend


async def test_an_on_policy_run_that_is_killed_repeats_what_came_after_its_last_checkpoint(
    paced: Supervisor, paced_home: Path, paced_server: LocalServer, tmp_path: Path
) -> None:
    path = await a_teacher(distill_backend_of(paced_server), tmp_path / "teacher", steps=4)
    plan = a_planned_distillation(teacher_checkpoint=path, steps=8, save_every=2)
    whole = completed(paced, paced.start(plan).run_id, paced_home).run_id
    killed = paced.start(plan).run_id
    reached(paced, killed, 3)
    kill(paced, killed)
    until(lambda: paced.run(killed).state == "crashed")
    paced.resume(killed)
    completed(paced, killed, paced_home)
    expected = metric_lines(paced_home, whole, "teacher_kl")
    found = metric_lines(paced_home, killed, "teacher_kl")
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [kl for _, kl in found] == pytest.approx([kl for _, kl in expected], rel=1e-3)


def test_a_run_that_is_killed_while_its_teacher_answers_asks_only_for_the_rest(
    paced: Supervisor, paced_home: Path
) -> None:
    prompts = asked(tuple(f"word {number}" for number in range(PROMPTS)))
    plan = a_planned_distillation(mode="off_policy", train=prompts, group_size=1, steps=2)
    run_id = paced.start(plan).run_id
    answers = RunFolder.of(paced_home, run_id).path / "data" / teacher.FILE_NAME
    until(lambda: answers.exists() and answers.stat().st_size > 0)
    kill(paced, run_id)
    kept = answers.read_bytes().splitlines()
    until(lambda: paced.run(run_id).state == "crashed")
    paced.resume(run_id)
    completed(paced, run_id, paced_home)
    after = answers.read_bytes().splitlines()
    assert 0 < len(kept) < PROMPTS
    assert after[: len(kept) - 1] == kept[:-1]  # the last one may have been torn
    places = [json.loads(line)[0]["prompt"] for line in after]
    assert sorted(places) == list(range(PROMPTS))
    with RunStore(paced_home) as store:
        notes = [event.what for event in store.events(run_id) if event.kind == "note"]
    assert notes[0] == f"The teacher answers {PROMPTS} of {PROMPTS} prompts."
    assert notes[1] != notes[0]
