"""What start_run checks of an rl run before anything is sampled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from planning import planned, refusal, workspace_on, write

from tinker_mcp.runs import prompts
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.plan import forecast
from tinker_mcp.settings import Settings
from tinker_mcp.training.clients import Workspace

NUMBER = {"reward": {"type": "number"}, "max_tokens": 16}
ARITHMETIC = "tinker_cookbook.recipes.math_rl.arithmetic_env:ArithmeticDatasetBuilder"


@pytest.fixture
async def workspace(runs_home: Path, tmp_path: Path) -> AsyncIterator[Workspace]:
    async with workspace_on(Settings(home=runs_home, roots=(tmp_path,))) as opened:
        yield opened


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n} + {n}?", "answer": 2 * n} for n in range(count)]


async def an_rl_plan(workspace: Workspace, data: str, rl: dict[str, Any], **asked: Any) -> Any:
    return await planned(workspace, data, method="rl", rl=rl, eval_share=None, **asked)


async def why_not(workspace: Workspace, data: str, rl: dict[str, Any], **asked: Any) -> str:
    return await refusal(workspace, data, method="rl", rl=rl, eval_share=None, **asked)


async def test_all_that_was_left_open_is_settled(workspace: Workspace, tmp_path: Path) -> None:
    data = write(tmp_path, sums(40))
    found = await an_rl_plan(workspace, data, NUMBER)
    spec = found.spec
    assert (spec.method, spec.batch_size, spec.steps) == ("rl", 16, 3)  # 40 prompts once
    assert spec.learning_rate == 4e-5
    assert (spec.rl.group_size, spec.rl.max_tokens, spec.rl.loss_fn) == (
        8,
        16,
        "importance_sampling",
    )
    assert spec.rl.reward["type"] == "number"
    assert spec.train.datums == 40
    assert found.train[0].row["answer"] == 0
    assert found.train[0].messages == [{"role": "user", "content": "What is 0 + 0?"}]
    assert spec.held_out is None
    assert found.estimate.usd_high == 0


async def test_a_share_of_the_prompts_is_held_out(workspace: Workspace, tmp_path: Path) -> None:
    data = write(tmp_path, sums(40))
    found = await planned(workspace, data, method="rl", rl=NUMBER, eval_share=0.1)
    assert (found.spec.train.datums, found.spec.held_out.datums) == (36, 4)
    assert found.spec.eval_every == 1


async def test_prompts_are_kept_as_they_are_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say red.", "word": "red"},
        {"messages": [{"role": "user", "content": "Hi."}], "word": "x", "n": [1, {"a": None}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]},
    ]
    path = Path(write(tmp_path, rows))
    found, problems = prompts.read(path, "rows", {})
    assert problems == []
    assert [len(one.messages) for one in found] == [1, 1, 1, 2]
    assert found[2].row["messages"][1]["content"] == "A"  # for the reward
    kept = tmp_path / "kept.jsonl"
    sha256 = prompts.save(kept, found)
    assert prompts.load(kept, sha256) == found


async def test_rows_without_a_prompt_are_refused_by_line(
    workspace: Workspace, tmp_path: Path
) -> None:
    data = write(tmp_path, [*sums(2), {"question": "What?"}, {"prompt": ""}, {"messages": []}])
    said = await why_not(workspace, data, NUMBER)
    assert "3 of 5 rows of data" in said
    assert "line 3" in said
    assert "columns" in said
    found = await an_rl_plan(
        workspace, write(tmp_path, [{"question": "1 + 1?", "answer": 2}] * 4, "b.jsonl"), NUMBER,
        columns={"prompt": "question"},
    )  # fmt: skip
    assert found.train[0].messages[0]["content"] == "1 + 1?"


async def test_a_reward_that_scores_no_row_is_refused_with_its_words(
    workspace: Workspace, tmp_path: Path
) -> None:
    data = write(tmp_path, [{"prompt": "What?"}] * 4)
    said = await why_not(workspace, data, NUMBER)
    assert "the row has no 'answer'" in said
    (tmp_path / "reward.py").write_text("def reward(completion, row):\n    return row['gold']\n")
    said = await why_not(workspace, data, {"reward": "reward.py"})
    assert "gold" in said
    (tmp_path / "reward.py").write_text("def grade(completion): ...\n")
    assert "reward" in await why_not(workspace, data, {"reward": "reward.py"})


async def test_a_file_of_a_reward_is_kept_by_its_whole_path_and_hash(
    workspace: Workspace, tmp_path: Path
) -> None:
    data = write(tmp_path, sums(4))
    (tmp_path / "reward.py").write_text("def reward(completion, row):\n    return 1.0\n")
    found = await an_rl_plan(workspace, data, {"reward": "reward.py"})
    assert found.spec.rl.reward["path"] == str(tmp_path / "reward.py")
    assert len(found.spec.rl.reward_sha256) == 64


@pytest.mark.parametrize(
    ("rl", "says"),
    [
        ({}, "either reward or environment"),
        ({**NUMBER, "environment": ARITHMETIC}, "either reward or environment"),
        ({**NUMBER, "loss_fn": "dro"}, "dro needs beta in rl.loss_config"),
        ({**NUMBER, "loss_config": {"beta": 1}}, "takes no rl.loss_config"),
        ({"reward": {"type": "no such"}}, "exact_match"),
        ({"reward": "/etc/passwd"}, "outside the allowed folders"),
    ],
)
async def test_options_that_do_not_go_together_are_refused(
    workspace: Workspace, tmp_path: Path, rl: dict[str, Any], says: str
) -> None:
    assert says in await why_not(workspace, write(tmp_path, sums(4)), rl)


async def test_prompts_that_leave_no_room_for_an_answer_are_refused(
    workspace: Workspace, tmp_path: Path
) -> None:
    said = await why_not(workspace, write(tmp_path, sums(4)), {**NUMBER, "max_tokens": 4090})
    assert "The longest prompt" in said


async def test_an_environment_needs_steps_and_no_data(workspace: Workspace, tmp_path: Path) -> None:
    asked = RunArguments(
        method="rl",
        base_model="tinker-local/tiny",
        steps=2,
        batch_size=2,
        rl={"environment": ARITHMETIC, "max_tokens": 8},
    )
    found = await forecast(workspace, asked)
    assert found is not None
    assert found.train == ()
    assert found.spec.train.source == ARITHMETIC
    assert any("without a jail" in warning for warning in found.warnings)
    said = await why_not(workspace, write(tmp_path, sums(4)), {"environment": ARITHMETIC})
    assert "steps is missing" in said
    assert "data=" in said


async def test_an_environment_that_is_none_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    said = await why_not(
        workspace, write(tmp_path, sums(4)), {"environment": "no_such_package.env:Env"}
    )
    assert "no installed module" in said


async def test_rl_is_for_its_method_only(workspace: Workspace, tmp_path: Path) -> None:
    said = await refusal(workspace, write(tmp_path, sums(4)), rl=NUMBER)
    assert "rl is for method=rl only" in said
    said = await refusal(workspace, write(tmp_path, sums(4)), method="rl", rl=None)
    assert "method=rl needs rl" in said
