"""A distillation before it is started: what is settled, and what cannot be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from detached import completed
from distill_runs import a_teacher, distill_backend_of
from planning import TINY, planned, refusal, workspace_on, write

from servers import LocalServer
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.planning import distill_plan
from tinker_mcp.runs.policy import teacher
from tinker_mcp.runs.showing.views import summary
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings
from tinker_mcp.store.runs import RunStore
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.prices import FILE_NAME

SMALL: dict[str, Any] = {"max_tokens": 8}


@pytest.fixture
async def workspace(runs_home: Path, tmp_path: Path) -> AsyncIterator[Workspace]:
    async with workspace_on(Settings(home=runs_home, roots=(tmp_path,))) as opened:
        yield opened


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Twenty prompts."""
    return write(tmp_path, [{"prompt": f"Say {number}."} for number in range(20)])


async def test_on_policy_is_the_default_with_four_samples_a_prompt(
    workspace: Workspace, data: str
) -> None:
    found = await planned(workspace, data, method="distill", distill={**SMALL, "teacher": TINY})
    spec = found.spec
    assert spec.distill is not None
    assert (spec.distill.mode, spec.distill.group_size) == ("on_policy", 4)
    assert (spec.distill.teacher_base_model, spec.distill.teacher_checkpoint) == (TINY, None)
    assert spec.distill.has_same_tokenizer
    assert (spec.batch_size, spec.steps, spec.learning_rate) == (16, 2, 1e-4)  # 20 prompts once
    assert [prompt.messages[0]["content"] for prompt in found.train[:2]] == ["Say 0.", "Say 1."]


async def test_off_policy_counts_answers_as_the_units_of_its_batches(
    workspace: Workspace, data: str
) -> None:
    asked = {**SMALL, "teacher": TINY, "mode": "off_policy", "group_size": 2}
    found = await planned(workspace, data, method="distill", distill=asked, batch_size=8)
    assert found.spec.steps == 5  # 20 prompts, 2 answers each, 8 a step
    assert found.estimate.tokens["teacher_sample"] == 20 * 2 * 2  # a quarter of max_tokens


async def test_prompt_distill_takes_its_own_base_model_as_teacher(
    workspace: Workspace, data: str
) -> None:
    asked = {**SMALL, "system_prompt": "Answer in capital letters."}
    found = await planned(workspace, data, method="prompt_distill", distill=asked)
    assert found.spec.distill is not None
    assert found.spec.distill.mode == "off_policy"
    assert found.spec.distill.teacher_base_model == TINY
    without = await planned(
        workspace, data, method="distill", distill={**SMALL, "teacher": TINY, "mode": "off_policy"}
    )
    longer = found.estimate.tokens["teacher_prefill"] - without.estimate.tokens["teacher_prefill"]
    assert longer >= 20 * 20  # the system prompt, once a prompt


async def test_a_teacher_may_be_sampler_weights_of_a_run(
    workspace: Workspace, data: str, runs_server: LocalServer, tmp_path: Path
) -> None:
    path = await a_teacher(distill_backend_of(runs_server), tmp_path / "teacher", steps=1)
    found = await planned(workspace, data, method="distill", distill={**SMALL, "teacher": path})
    assert found.spec.distill is not None
    assert found.spec.distill.teacher_checkpoint == path
    assert found.spec.distill.teacher_base_model == TINY
    state = path.replace("/sampler_weights/", "/weights/")
    told = await refusal(workspace, data, method="distill", distill={**SMALL, "teacher": state})
    assert "cannot be sampled" in told


@pytest.mark.parametrize(
    ("method", "asked", "problem"),
    [
        ("distill", None, "needs distill, its options"),
        ("distill", {}, "distill.teacher is missing"),
        ("distill", {"teacher": "No/Such"}, "teacher: 'No/Such' is not among"),
        ("distill", {"teacher": "tinker://x"}, "is no checkpoint's path"),
        ("distill", {"teacher": TINY, "system_prompt": "Hi."}, "is for prompt_distill only"),
        ("prompt_distill", {}, "distill.system_prompt is missing"),
        ("prompt_distill", {"system_prompt": "Hi.", "mode": "on_policy"}, "does not go with"),
        ("prompt_distill", {"system_prompt": "Hi. " * 9999}, "its system prompt included"),
        ("sft", {"teacher": TINY}, "distill is for method=distill and prompt_distill only"),
    ],
)
async def test_what_does_not_go_together_is_told(
    workspace: Workspace, data: str, method: str, asked: dict[str, Any] | None, problem: str
) -> None:
    given = None if asked is None else {**SMALL, **asked}
    assert problem in await refusal(workspace, data, method=method, distill=given)


async def test_a_teacher_with_another_tokenizer_can_answer_but_not_score(
    workspace: Workspace, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill_plan, "_has_same_tokens", lambda *_: False)
    asked = {**SMALL, "teacher": TINY}
    told = await refusal(workspace, data, method="distill", distill=asked)
    assert "has another tokenizer" in told
    assert "mode=off_policy" in told
    off_policy = {**asked, "mode": "off_policy"}
    found = await planned(workspace, data, method="distill", distill=off_policy)
    assert any("are learned as text" in warning for warning in found.warnings)


async def test_the_estimate_prices_the_teachers_tokens_as_the_teachers(
    runs_server: LocalServer, data: str, tmp_path: Path
) -> None:
    home = tmp_path / "hosted-home"
    home.mkdir()
    price = '{"train": 1.0, "prefill": 2.0, "sample": 4.0}'
    (home / FILE_NAME).write_text(f'{{"{TINY}": {price}}}')
    settings = Settings(
        backend="hosted",
        base_url=runs_server.base_url,
        api_key=runs_server.api_key,
        home=home,
        roots=(tmp_path,),
    )
    asked = {**SMALL, "teacher": TINY}
    async with workspace_on(settings, Path(runs_server.env["HF_HOME"]) / "hub") as workspace:
        found = await planned(workspace, data, method="distill", distill=asked, max_usd=100.0)
        poor = await refusal(workspace, data, method="distill", distill=asked, max_usd=1e-6)
    tokens, usd = found.estimate.tokens, found.estimate.usd_low
    dollars = (
        tokens["train"]
        + 2 * tokens["prefill"]
        + 4 * tokens["sample"]
        + 2 * tokens["teacher_prefill"]
    ) / 1e6
    assert usd == pytest.approx(dollars, rel=1e-3)
    assert tokens["sample"] == 2 * 16 * 4 * 2  # steps, prompts, samples, a quarter of max_tokens
    assert tokens["teacher_prefill"] == tokens["train"]  # it scores what is trained
    assert "is below the estimate" in poor


@pytest.mark.parametrize("mode", ["on_policy", "off_policy"])
async def test_a_worker_distills_what_was_planned(
    workspace: Workspace, supervisor: Supervisor, data: str, runs_home: Path, mode: str
) -> None:
    asked = {**SMALL, "teacher": TINY, "mode": mode, "group_size": 2}
    found = await planned(
        workspace, data, method="distill", distill=asked, steps=2, batch_size=2, eval_share=0.1
    )
    row = supervisor.start(found)
    completed(supervisor, row.run_id, runs_home)
    folder = RunFolder.of(runs_home, row.run_id)
    with RunStore(runs_home) as store:
        shown = summary(store, store.get(row.run_id))
    told = {"on_policy": "teacher_kl", "off_policy": "train_mean_nll"}[mode]
    assert (shown.loss_metric, shown.step) == (told, 2)
    assert shown.eval is not None
    assert (folder.path / "data" / teacher.FILE_NAME).exists() == (mode == "off_policy")
