"""What the scripts share, where a script's result would not show it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import tinker

from tinker_mcp import scripting
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import models, prices
from tinker_mcp.training.backend import Backend

PROMPT = tinker.ModelInput.from_ints([1, 2, 3])


def sequence(*tokens: int, logprobs: list[float]) -> tinker.SampledSequence:
    """As the SDK makes it of an answer."""
    return tinker.SampledSequence(
        stop_reason="stop",
        sequence_id="0",
        tokens_np=np.array(tokens),
        logprobs_np=np.array(logprobs),
    )


def test_an_answers_datum_predicts_each_of_its_tokens_and_leaves_the_prompt_out() -> None:
    datum = scripting.answer_datum(PROMPT, sequence(7, 8, logprobs=[-0.5, -0.25]), [1.0, 2.0])

    assert datum.model_input.to_ints() == [1, 2, 3, 7]
    columns = {name: column.tolist() for name, column in datum.loss_fn_inputs.items()}
    assert columns == {
        "target_tokens": [0, 0, 7, 8],
        "logprobs": [0.0, 0.0, -0.5, -0.25],
        "advantages": [0.0, 0.0, 1.0, 2.0],
    }


def test_an_answers_advantage_is_its_reward_less_the_groups_mean() -> None:
    group = [sequence(7, logprobs=[-1.0]), sequence(8, logprobs=[-1.0])]

    first, second = scripting.group_datums(PROMPT, group, [1.0, 0.0])

    assert first.loss_fn_inputs["advantages"].tolist() == [0.0, 0.0, 0.5]
    assert second.loss_fn_inputs["advantages"].tolist() == [0.0, 0.0, -0.5]


def test_a_group_whose_rewards_are_equal_is_left_out() -> None:
    group = [sequence(7, logprobs=[-1.0]), sequence(8, logprobs=[-1.0])]

    assert scripting.group_datums(PROMPT, group, [0.1, 0.1]) == []


def test_drift_is_the_mean_over_the_sampled_tokens_alone() -> None:
    datum = scripting.answer_datum(PROMPT, sequence(7, 8, logprobs=[-0.5, -0.3]), [1.0, 1.0])
    trainers = tinker.TensorData(data=[-9.0, -9.0, -0.6, -0.5], dtype="float32")
    output = tinker.ForwardBackwardOutput(
        loss_fn_output_type="", loss_fn_outputs=[{"logprobs": trainers}], metrics={}
    )

    assert scripting.drift([datum], output) == pytest.approx((0.1 + 0.2) / 2)


@dataclass
class Noted:
    """A future that notes in `events` when it is awaited."""

    name: str
    events: list[str]

    def result(self) -> str:
        self.events.append(f"await {self.name}")
        return self.name


def test_each_step_is_submitted_before_the_one_ahead_of_it_is_awaited() -> None:
    events: list[str] = []

    def submit(step: int) -> Iterator[Noted]:
        events.append(f"submit {step}")
        return iter([Noted(f"loss {step}", events), Noted(f"optim {step}", events)])

    assert list(scripting.overlapped(submit, 2)) == ["loss 0", "loss 1"]
    assert events == [
        *("submit 0", "submit 1", "await loss 0", "await optim 0"),
        *("await loss 1", "await optim 1"),
    ]


def test_what_a_model_without_a_known_price_costs_is_unknown() -> None:
    backend = Backend("hosted", "https://example.invalid", None)
    price = prices.Price(2.0, "a test", "", prefill=1.0, sample=None)

    opened = [scripting.Opened(backend, "a/model", None, known, None) for known in (None, price)]

    assert [one.usd(train=10) for one in opened] == [None, None]


@pytest.mark.parametrize("rate", [0.0, -1e-4, 1e-2, float("nan")])
def test_a_learning_rate_that_no_run_survives_is_refused(rate: float) -> None:
    with pytest.raises(InvalidInputError, match="--learning-rate"):
        scripting.checked(argparse.Namespace(), rate=rate)


def test_without_wandb_a_sweep_that_asks_for_it_is_told_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(InvalidInputError, match=r"pip install 'tinker-mcp\[wandb\]'"):
        scripting.wandb()


def test_the_default_models_learning_rate_is_not_taken_for_other_models() -> None:
    options = scripting.training_parser("", steps=1, learning_rate=3e-4, name="a-test")
    advice = models.Advice(1e-5, "a test")

    def rate(*argv: str) -> float:
        return scripting.learning_rate(options.parse_args(argv), advice)

    assert rate() == 3e-4
    assert rate("--base-model=other/model") == 1e-5
    assert rate("--learning-rate=2e-4") == rate("--learning-rate=2e-4", "--base-model=o/m") == 2e-4
