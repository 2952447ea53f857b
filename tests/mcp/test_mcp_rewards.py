"""The tool test_reward: cases, real rows, games, and what a judge says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from agents import TINY, in_memory

from tinker_mcp.settings import Settings

NUMBER = {"type": "number", "column": "answer"}
ROWS = [
    {"prompt": f"What is {n} + {n}?", "answer": 2 * n, "completions": [f"It is {2 * n}.", "100"]}
    for n in range(1, 9)
]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", roots=(tmp_path,))


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "rows.jsonl"


async def test_cases_are_told_beside_what_was_expected(settings: Settings) -> None:
    cases = [
        {"completion": "It is 4.", "row": {"answer": 4}, "expected": 1},
        {"completion": "It is 5.", "row": {"answer": 4}, "expected": 1},
        {"completion": "It is 5.", "row": {}},
    ]
    async with in_memory(settings) as agent:
        tested = await agent.call("test_reward", reward=NUMBER, cases=cases)
    assert tested["finished"]
    assert [(case["value"], case["ok"]) for case in tested["cases"]] == [
        (1, True),
        (0, False),
        (None, None),
    ]
    assert tested["cases"][2]["error"] == "the row has no 'answer'"
    assert "1 of 3 cases have not the expected value." in tested["warnings"]
    assert list(tested)[-1] == "next_step"


async def test_real_rows_show_distribution_groups_and_games(
    settings: Settings, tmp_path: Path
) -> None:
    async with in_memory(settings) as agent:
        tested = await agent.call("test_reward", reward=NUMBER, data=write(tmp_path, ROWS))
    assert tested["distribution"] == {
        "values": 16, "min": 0, "mean": 0.5, "max": 1, "std": 0.5,
        "histogram": {"0": 8, "0.8": 8},
    }  # fmt: skip
    assert tested["groups"] == {"count": 8, "all_zero": 0, "all_one": 0, "constant": 0}
    games = {name: game["mean"] for name, game in tested["games"].items()}
    # "What is 2 + 2?" ends with a 2, so the echo is wrong; repeating the answer is a game here.
    assert games == {
        "answer_alone": 1, "empty": 0, "prompt_echoed": 0, "answer_ten_times": 1,
    }  # fmt: skip
    assert tested["warnings"] == [
        "The answer ten times scores as high as an honest one in 8 of 8 rows."
    ]


async def test_an_exact_match_cannot_be_gamed(settings: Settings, tmp_path: Path) -> None:
    data = write(tmp_path, [{"prompt": "Capital of Italy?", "answer": "Rome"}] * 3)
    async with in_memory(settings) as agent:
        tested = await agent.call("test_reward", reward={"type": "exact_match"}, data=data)
    assert tested["warnings"] == []
    assert tested["next_step"] == "Use it as the reward of a run."


async def test_a_file_that_pays_for_anything_is_found_out(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "reward.py").write_text("def reward(completion, row): return 1.0")
    async with in_memory(settings) as agent:
        tested = await agent.call("test_reward", reward="reward.py", data=write(tmp_path, ROWS))
    assert "Every sample scores 1: there is nothing to learn from it." in tested["warnings"]
    assert tested["groups"]["all_one"] == tested["groups"]["constant"] == 8


async def test_a_file_that_pays_for_length_is_gamed_by_the_answer_ten_times(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "reward.py").write_text(
        "def reward(completion, row):\n    return min(len(completion), 20) / 20\n"
    )
    async with in_memory(settings) as agent:
        tested = await agent.call("test_reward", reward="reward.py", data=write(tmp_path, ROWS))
    assert any(warning.startswith("The answer ten times") for warning in tested["warnings"])


async def test_hostile_samples_are_errors_and_the_rest_has_values(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "reward.py").write_text(
        "import os\ndef reward(completion, row):\n"
        "    return os._exit(1) if completion == '100' else float(str(row['answer']) in completion)"
    )
    async with in_memory(settings) as agent:
        tested = await agent.call("test_reward", reward="reward.py", data=write(tmp_path, ROWS))
    assert tested["errors"] == {"its process ended with status 1": 8}
    assert tested["distribution"]["values"] == 8


async def test_a_changed_file_is_read_again(settings: Settings, tmp_path: Path) -> None:
    cases = [{"completion": "x"}]
    async with in_memory(settings) as agent:
        for value in (0.25, 0.75):
            (tmp_path / "reward.py").write_text(f"def reward(c, r): return {value}")
            tested = await agent.call("test_reward", reward="reward.py", cases=cases)
            assert tested["cases"][0]["value"] == value


async def test_a_slow_reward_is_collected_by_the_same_call(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "import time\ndef reward(c, r):\n    time.sleep(1.5)\n    return 1"
    )
    settings = Settings(home=tmp_path / "home", roots=(tmp_path,), call_limit_s=0.5)
    async with in_memory(settings) as agent:
        asked = {"reward": "reward.py", "cases": [{"completion": "x"}]}
        tested = await agent.call("test_reward", **asked)
        assert not tested["finished"]
        assert "same arguments" in tested["next_step"]
        while not tested["finished"]:
            tested = await agent.call("test_reward", **asked)
    assert tested["cases"][0]["value"] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"reward": NUMBER}, "test_reward has nothing to score"),
        ({"reward": {"type": "x"}, "cases": [{"completion": ""}]}, "exact_match, number, regex"),
        ({"reward": "no.py", "cases": [{"completion": ""}]}, "not_found: No file"),
        ({"reward": "../r.py", "cases": [{"completion": ""}]}, "outside the allowed folders"),
        ({"reward": NUMBER, "data": "../x"}, "outside the allowed folders"),
        ({"reward": NUMBER, "cases": [{"text": "x"}]}, "completion"),
    ],
)
async def test_what_cannot_be_tested_says_why(
    arguments: dict[str, Any], told: str, settings: Settings
) -> None:
    async with in_memory(settings) as agent:
        assert told in await agent.error("test_reward", **arguments)


async def test_check_setup_says_which_isolations_hold(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        setup = await agent.call("check_setup")
    assert setup["jail"].startswith("jail: ")


async def test_a_judge_without_a_grade_leaves_the_sample_out(home: Path, tmp_path: Path) -> None:
    settings = Settings(home=home, roots=(tmp_path,))
    judge = {"type": "judge", "base_model": TINY, "max_tokens": 8}
    async with in_memory(settings) as agent:
        tested = await agent.call("test_reward", reward=judge, cases=[{"completion": "Yes."}])
        while not tested["finished"]:
            tested = await agent.call("test_reward", reward=judge, cases=[{"completion": "Yes."}])
    (case,) = tested["cases"]
    assert case["value"] is None
    assert "the judge gave no grade" in case["error"]
