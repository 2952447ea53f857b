"""The ranges of what may be asked of start_run."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tinker_mcp.runs.planning.arguments import RunArguments


def test_whatever_is_left_out_is_left_open() -> None:
    asked = RunArguments(method="sft", data="train.jsonl")
    left_open = {
        name for name in RunArguments.model_fields if getattr(asked, name) in (None, "auto")
    }
    assert left_open >= {"steps", "epochs", "batch_size", "learning_rate", "rank", "max_length"}
    assert asked.ttl_s == 7 * 24 * 3600


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "grpo"},
        {"steps": 0},
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"learning_rate": "high"},
        {"learning_rate": float("nan")},
        {"eval_share": 1},
        {"eval_share": -0.1},
        {"max_length": 1},
        {"rank": 0},
        {"beta": 0},
        {"save_every": -1},
        {"max_usd": 0},
        {"max_usd": float("inf")},
        {"seed": -1},
        {"loggers": ("mlflow",)},
        {"accept": ("everything",)},
        {"lr_schedule": "steps"},
        {"colour": "red"},
    ],
)
def test_values_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    asked = {"method": "sft", "data": "train.jsonl", **wrong}
    with pytest.raises(ValidationError):
        RunArguments(**asked)
