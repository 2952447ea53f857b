"""What a judge is asked, and which of its answers is a grade."""

from __future__ import annotations

import pytest

from tinker_mcp.training.rewards.contract import Scored
from tinker_mcp.training.rewards.judge import asked, grade
from tinker_mcp.training.rewards.specs import Judge

JUDGE = Judge(type="judge", base_model="m")
ROW = {"messages": [{"role": "user", "content": "Say {completion}."}], "answer": "Hello"}


def test_the_question_holds_task_answer_and_scale() -> None:
    question = asked(JUDGE, "Good day", ROW)
    assert "Task:\nSay {completion}.\n" in question  # what a row says is no place to fill
    assert "<answer>\nGood day\n</answer>" in question
    assert "from 0 (worthless) to 10 (perfect)" in question


def test_an_answer_cannot_read_the_columns() -> None:
    assert "Hello" not in asked(JUDGE, "{answer}", ROW)


def test_an_own_template_takes_columns_and_leaves_other_braces() -> None:
    judge = Judge(type="judge", base_model="m", template='{"a": 1} {answer} {completion} {other}')
    assert asked(judge, "Hi", ROW) == '{"a": 1} Hello Hi {other}'


@pytest.mark.parametrize(
    ("answer", "scored"),
    [
        ("Fine. Score: 7", Scored(0.7)),
        ("Score: 2, no: **Score:** 10", Scored(1.0)),
        ("score = 2.5", Scored(0.25)),
        ("Score: 11", Scored(None, "the judge's grade 11 is not in 0..10")),
        ("Seven of ten", Scored(None, "the judge gave no grade: 'Seven of ten'")),
    ],
)
def test_the_last_grade_counts(answer: str, scored: Scored) -> None:
    assert grade(JUDGE, answer) == scored


def test_another_scale_is_told_as_zero_to_one() -> None:
    assert grade(Judge(type="judge", base_model="m", low=1, high=5), "Score: 3") == Scored(0.5)
