"""On-policy distillation: the student samples, its teacher scores."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from attempts import Run
from distill_runs import HELD_OUT_WORDS, a_distillation, a_teacher, asked, distill_backend_of

from servers import LocalServer
from tinker_mcp.runs import transcripts
from tinker_mcp.runs.methods import distill
from tinker_mcp.runs.policy.completer import Policy
from tinker_mcp.runs.policy.drift import KlAlarm
from tinker_mcp.runs.policy.rollouts import PromptGroup
from tinker_mcp.store.runs import RunStore
from tinker_mcp.training import rendering
from tinker_mcp.training.backend import Backend
from tiny_data import TINY

if TYPE_CHECKING:
    import tinker

ANSWER_S = 30.0


@pytest.fixture
def backend(tiny_server: LocalServer) -> Backend:
    return distill_backend_of(tiny_server)


def kl_of(run: Run) -> list[float]:
    """The student's reverse KL to its teacher, by step."""
    return list(run.series("train", "teacher_kl").values())


async def test_a_student_comes_nearer_to_its_teacher(backend: Backend, tmp_path: Path) -> None:
    run = a_distillation(
        tmp_path,
        teacher_checkpoint=await a_teacher(backend, tmp_path / "teacher"),
        held_out=asked(HELD_OUT_WORDS),
        steps=12,
        batch_size=4,
        group_size=8,
    )
    outcome = await run.attempt(backend)
    kl, held_out = kl_of(run), run.series("eval", "test/teacher_kl")
    assert (outcome.state, outcome.reason) == ("completed", None)
    assert sum(kl[-3:]) < sum(kl[:3]) / 2
    assert list(held_out) == [0, 12]
    assert held_out[12] < held_out[0] / 2


async def test_a_student_that_is_its_teacher_has_a_kl_of_0_and_learns_nothing(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_distillation(tmp_path, steps=1)
    await run.attempt(backend)
    assert kl_of(run) == pytest.approx([0.0], abs=1e-4)


async def scored_group(backend: Backend, run: Run, scorer: Any) -> distill.Group:
    """Two samples of the untrained model, with a teacher's advantages."""
    student = rendering.load(backend, TINY, run.spec.renderer)
    assert run.spec.distill is not None
    attempt: Any = run
    journal = run.journal()
    alarm = KlAlarm(journal, max_off_policy_steps=0, temperature=1.0)
    scored = distill._Scored(attempt, run.spec.distill, student, scorer, alarm)
    import tinker

    service = tinker.ServiceClient(base_url=backend.base_url, api_key=backend.api_key)
    client = service.create_sampling_client(base_model=TINY).result(ANSWER_S)
    rows: Any = run.train
    policy = Policy(client, max_tokens=4, temperature=1.0, seed=1, context=512)
    with contextlib.closing(journal):
        return await scored._group(PromptGroup(rows[0], student, 2), policy)


class Certain:
    """A teacher that gives every token the same logprob."""

    def __init__(self, logprob: float) -> None:
        self.logprob = logprob
        self.asked: list[tinker.ModelInput] = []

    async def compute_logprobs_async(self, prompt: tinker.ModelInput) -> list[float | None]:
        self.asked.append(prompt)
        return [None, *[self.logprob] * (prompt.length - 1)]


async def test_the_advantage_of_a_token_is_minus_its_reverse_kl(
    backend: Backend, tmp_path: Path
) -> None:
    group = await scored_group(backend, a_distillation(tmp_path, kl_coef=2.0), Certain(-1.5))
    assert len(group.datums) == 2
    for datum, reward in zip(group.datums, group.rolled.rewards, strict=True):
        inputs = datum.loss_fn_inputs
        mask = inputs["mask"].to_numpy()
        student = inputs["logprobs"].to_numpy()
        assert inputs["advantages"].to_numpy() == pytest.approx(-2.0 * mask * (student + 1.5))
        assert reward == pytest.approx(-((student + 1.5) * mask).sum() / mask.sum(), rel=1e-5)
    kl = sum(-reward * 4 for reward in group.rolled.rewards) / 8  # four tokens each
    assert group.teacher_kl == pytest.approx(kl, rel=1e-5)


async def test_the_teacher_scores_the_whole_sequence_once(backend: Backend, tmp_path: Path) -> None:
    teacher = Certain(-1.0)
    group = await scored_group(backend, a_distillation(tmp_path), teacher)
    assert len(teacher.asked) == 2
    for datum, asked_for in zip(group.datums, teacher.asked, strict=True):
        last = datum.loss_fn_inputs["target_tokens"].tolist()[-1]
        assert asked_for.to_ints() == [*datum.model_input.to_ints(), last]
    assert group.scored_tokens == sum(one.length for one in teacher.asked)


async def test_four_steps_equal_two_and_two_after_a_resume(
    backend: Backend, tmp_path: Path
) -> None:
    teacher = await a_teacher(backend, tmp_path / "teacher", steps=4)
    whole = a_distillation(tmp_path / "whole", teacher_checkpoint=teacher, steps=4)
    parts = a_distillation(tmp_path / "parts", teacher_checkpoint=teacher, steps=2)
    await whole.attempt(backend)
    await parts.attempt(backend)
    parts.change(steps=4)
    await parts.attempt(backend)
    assert kl_of(parts) == pytest.approx(kl_of(whole), rel=1e-4)
    told = transcripts.last(transcripts.path_in(parts.folder.path), 100)
    assert sorted({line["step"] for line in told}) == [1, 2, 3, 4]


async def test_with_k_1_a_batch_is_sampled_with_weights_one_step_old(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_distillation(tmp_path, max_off_policy_steps=1)
    await run.attempt(backend)
    assert list(run.series("train", "off_policy_steps").values()) == [0, 1, 1, 1]


async def test_a_step_is_recorded_under_the_cookbooks_names(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_distillation(tmp_path, steps=1)
    await run.attempt(backend)
    with RunStore(run.home) as store:
        (row,) = store.metrics(run.run_id, "train")
    assert {
        "teacher_kl",
        "optim/entropy",
        "optim/kl_sample_train_v1",
        "optim/kl_sample_train_v2",
        "env/all/ac_tokens_per_turn",
    } <= row.numbers.keys()
    assert row.numbers["optim/kl_sample_train_v2"] < 1e-6
    assert not any("reward" in name for name in row.numbers)


async def test_sampling_and_scoring_are_paid_for_before_a_step_is_begun(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_distillation(
        tmp_path,
        max_usd=0.01,
        usd_per_million=1.0,
        sample_usd_per_million=50.0,  # 32 tokens a step at most: $0.0016
        prefill_usd_per_million=1.0,
        teacher_prefill_usd_per_million=10.0,  # some 150 tokens a step: $0.0015
        steps=20,
    )
    outcome = await run.attempt(backend)
    journal = run.journal()
    spent = journal.spent_usd
    journal.close()
    done = len(kl_of(run))
    used = run.series("train", "sampling/sampled_tokens"), run.series("train", "num_tokens")
    prefill = run.series("train", "sampling/prefill_tokens")
    scored = run.series("train", "teacher/scored_tokens")
    dollars = (
        50 * sum(used[0].values())
        + sum(used[1].values())
        + sum(prefill.values())
        + 10 * sum(scored.values())
    ) / 1e6
    assert (outcome.state, outcome.reason) == ("stopped", "budget")
    assert 1 <= done < 20
    assert spent <= 0.01
    assert spent == pytest.approx(dollars, abs=1e-9)
    assert [row.step for row in run.checkpoints()] == [done]


async def test_a_stop_saves_the_step_it_is_at(backend: Backend, tmp_path: Path) -> None:
    run = a_distillation(tmp_path, steps=50)
    journal = run.journal()
    recorded = journal.step

    def stop_after_the_first(step: int, numbers: Any) -> None:
        recorded(step, numbers)
        journal.asked = "save"

    journal.step = stop_after_the_first  # type: ignore[method-assign]
    outcome = await run.attempt(backend, journal)
    assert (outcome.state, outcome.reason) == ("stopped", "user")
    assert [row.step for row in run.checkpoints()] == [len(kl_of(run))]
