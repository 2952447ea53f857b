"""Off-policy distillation and prompt distillation: the teacher answers once, sft learns it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attempts import Run
from distill_runs import a_distillation, a_teacher, asked, distill_backend_of, notes

from servers import LocalServer
from tinker_mcp.runs.journal import Journal
from tinker_mcp.runs.policy import teacher
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.states import StopReason
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.datums import trained_tokens
from tinker_mcp.training.rendering import load

SHOUT = "Answer in capital letters."


@pytest.fixture
def backend(tiny_server: LocalServer) -> Backend:
    return distill_backend_of(tiny_server)


def off_policy(home: Path, **changes: Any) -> Run:
    return a_distillation(home, mode="off_policy", **changes)


def losses(run: Run) -> list[float]:
    return list(run.series("train", "train_mean_nll").values())


def answers_of(run: Run) -> list[dict[str, Any]]:
    """All answers in the run's folder."""
    lines = (run.folder.path / "data" / teacher.FILE_NAME).read_text().splitlines()
    return [answer for line in lines for answer in json.loads(line)]


async def test_the_student_learns_its_teachers_answers(backend: Backend, tmp_path: Path) -> None:
    path = await a_teacher(backend, tmp_path / "teacher")
    run = off_policy(
        tmp_path, teacher_checkpoint=path, held_out=asked(("teal", "lime")), group_size=4, steps=12
    )
    outcome = await run.attempt(backend)
    nll, held_out = losses(run), run.series("eval", "test/nll")
    assert (outcome.state, outcome.reason) == ("completed", None)
    assert sum(nll[-3:]) < sum(nll[:3])
    assert held_out[12] < held_out[0]


async def test_each_prompt_gets_group_size_answers_and_a_held_out_one_a_single_one(
    backend: Backend, tmp_path: Path
) -> None:
    run = off_policy(tmp_path, held_out=asked(("teal", "lime")), group_size=3, steps=1)
    await run.attempt(backend)
    found = sorted((one["set"], one["prompt"], one["sample"]) for one in answers_of(run))
    train = [("train", prompt, sample) for prompt in range(4) for sample in range(3)]
    assert found == [("held_out", 0, 0), ("held_out", 1, 0), *train]


async def test_a_resume_does_not_ask_the_teacher_again(backend: Backend, tmp_path: Path) -> None:
    whole = off_policy(tmp_path / "whole", steps=4)
    parts = off_policy(tmp_path / "parts", steps=2)
    await whole.attempt(backend)
    await parts.attempt(backend)
    parts.change(steps=4)
    await parts.attempt(backend)
    assert notes(parts) == ["The teacher answers 4 of 4 prompts."]
    assert losses(parts) == losses(whole)


async def test_answers_that_a_kill_left_are_kept_and_only_the_others_are_sampled(
    backend: Backend, tmp_path: Path
) -> None:
    run, whole = off_policy(tmp_path / "killed", steps=1), off_policy(tmp_path / "whole", steps=1)
    await whole.attempt(backend)
    lines = (whole.folder.path / "data" / teacher.FILE_NAME).read_bytes().splitlines()
    torn = b"\n".join([*lines[:2], lines[2][:20]])
    (run.folder.path / "data" / teacher.FILE_NAME).write_bytes(torn)
    await run.attempt(backend)
    assert notes(run) == ["The teacher answers 2 of 4 prompts."]
    key = "prompt"
    assert sorted(answers_of(run), key=lambda one: one[key]) == sorted(
        answers_of(whole), key=lambda one: one[key]
    )


async def test_only_the_answers_tokens_are_trained_and_one_that_was_cut_teaches_no_end(
    backend: Backend, tmp_path: Path
) -> None:
    run = off_policy(tmp_path, steps=1)
    await run.attempt(backend)
    student = load(backend, run.spec.base_model, run.spec.renderer)
    answers = teacher.Answers(run.folder.path / "data" / teacher.FILE_NAME).of("train")
    assert run.spec.distill is not None
    rows: list[Any] = list(run.train)
    made, left_out = teacher.datums_of(rows, answers, student, run.spec.distill, 512)
    assert left_out == 0
    assert [trained_tokens(datum) for datum in made] == [len(one.tokens) for one in answers]
    targets = [datum.loss_fn_inputs["target_tokens"].tolist() for datum in made]
    for of_datum, answer in zip(targets, answers, strict=True):
        assert of_datum[-len(answer.tokens) :] == list(answer.tokens)


async def test_answers_of_another_tokenizer_are_learned_as_text_where_they_came_to_an_end(
    backend: Backend, tmp_path: Path
) -> None:
    run = off_policy(tmp_path, has_same_tokenizer=False)
    student = load(backend, run.spec.base_model, run.spec.renderer)
    message = {"role": "assistant", "content": "RED!"}
    whole = teacher.Answer("train", 0, 0, [7, 7], message, is_whole=True)
    cut = teacher.Answer("train", 1, 0, [7, 7], message, is_whole=False)
    assert run.spec.distill is not None
    rows: list[Any] = list(run.train)
    (datum,), left_out = teacher.datums_of(rows, [whole, cut], student, run.spec.distill, 512)
    tokens = datum.loss_fn_inputs["target_tokens"].tolist()
    weights = datum.loss_fn_inputs["weights"].tolist()
    trained = [token for token, weight in zip(tokens, weights, strict=True) if weight]
    assert left_out == 1
    assert student.decode(trained).startswith("RED!")


async def test_a_stop_keeps_the_answers_that_are_there(backend: Backend, tmp_path: Path) -> None:
    run = off_policy(tmp_path, train=asked(tuple(f"word {n}" for n in range(200))))
    journal = run.journal()
    kept = teacher.Answers.keep

    def stop_after_the_first(self: teacher.Answers, answers: Any) -> None:
        kept(self, answers)
        journal.asked = "save"

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(teacher.Answers, "keep", stop_after_the_first)
        outcome = await run.attempt(backend, journal)
    assert (outcome.state, outcome.reason) == ("stopped", "user")
    assert 1 <= len(answers_of(run)) < 200


@pytest.mark.parametrize(
    ("max_usd", "state", "reason"), [(1.0, "completed", None), (0.001, "stopped", "budget")]
)
async def test_the_teachers_answers_are_paid_for_at_its_price_before_they_are_asked_for(
    backend: Backend,
    tmp_path: Path,
    max_usd: float,
    state: str,
    reason: StopReason | None,
) -> None:
    run = off_policy(
        tmp_path,
        steps=1,
        max_usd=max_usd,
        teacher_prefill_usd_per_million=1.0,
        teacher_sample_usd_per_million=200.0,  # 8 tokens of an answer: $0.0016
    )
    outcome = await run.attempt(backend)
    assert (outcome.state, outcome.reason) == (state, reason)
    journal: Journal = run.journal()
    sampled = 0
    if state == "completed":
        sampled = sum(len(one["tokens"]) for one in answers_of(run))
    assert journal.spent_usd == pytest.approx(sampled * 200 / 1e6, abs=2e-4)  # and the prompts
    journal.close()


async def test_the_teacher_is_told_the_system_prompt_and_the_student_is_not(
    backend: Backend, tmp_path: Path
) -> None:
    run = off_policy(tmp_path, method="prompt_distill", system_prompt=SHOUT, steps=1)
    plain = off_policy(tmp_path / "plain", steps=1)
    await run.attempt(backend)
    await plain.attempt(backend)
    student = load(backend, run.spec.base_model, run.spec.renderer)
    answers = teacher.Answers(run.folder.path / "data" / teacher.FILE_NAME).of("train")
    assert run.spec.distill is not None
    rows: list[Any] = list(run.train)
    made, _ = teacher.datums_of(rows, answers, student, run.spec.distill, 512)
    assert not any(SHOUT in student.decode(datum.model_input.to_ints()) for datum in made)
    assert answers_of(run) != answers_of(plain)


def test_the_system_prompt_comes_before_a_prompts_own() -> None:
    alone = [{"role": "user", "content": "Hi."}]
    own = [{"role": "system", "content": "Be brief."}, *alone]
    assert teacher.instructed(alone, SHOUT) == [{"role": "system", "content": SHOUT}, *alone]
    both = {"role": "system", "content": f"{SHOUT}\n\nBe brief."}
    assert teacher.instructed(own, SHOUT) == [both, *alone]
    assert teacher.instructed(own, None) == own


async def test_a_prompt_without_a_learnable_answer_is_told(
    backend: Backend, tmp_path: Path
) -> None:
    long = Prompt([{"role": "user", "content": "red " * 100}], {})
    run = off_policy(tmp_path, train=[long, *asked()], max_length=100, steps=1)
    await run.attempt(backend)
    # Both answers to the long prompt, and of the others those that came out empty.
    useless = [one for one in answers_of(run) if one["prompt"] == 0 or not one["tokens"]]
    assert len([one for one in useless if one["prompt"] == 0]) == 2
    said = f"{len(useless)} of the teacher's 10 train answers are left out"
    assert any(note.startswith(said) for note in notes(run))
