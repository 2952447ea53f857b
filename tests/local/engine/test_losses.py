from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tinker_local.engine.losses import check_inputs, cross_entropy, target_logprobs
from tinker_local.errors import UserInputError

# softmax of log(1, 2, 5) is 1/8, 2/8, 5/8
LOGITS = torch.tensor([1.0, 2.0, 5.0]).log()


def test_target_logprobs_are_the_log_of_the_softmax() -> None:
    logits = LOGITS.expand(3, 3)

    scores = target_logprobs(logits, torch.tensor([0, 1, 2]))

    assert scores.tolist() == pytest.approx([math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)])


def test_target_logprobs_do_not_change_when_all_logits_shift() -> None:
    targets = torch.tensor([2])

    scores = target_logprobs(LOGITS.unsqueeze(0) + 80.0, targets)

    assert scores.item() == pytest.approx(math.log(5 / 8), abs=1e-5)


def test_target_logprobs_of_bfloat16_logits_are_float32() -> None:
    assert target_logprobs(LOGITS.bfloat16().unsqueeze(0), torch.tensor([0])).dtype == torch.float32


def test_cross_entropy_is_the_weighted_sum_over_tokens_not_their_mean() -> None:
    logprobs = torch.tensor([1 / 8, 2 / 8, 5 / 8]).log()

    loss = cross_entropy(logprobs, {"weights": torch.tensor([2.0, 0.0, 0.5])})

    assert loss.item() == pytest.approx(2 * math.log(8) + 0.5 * math.log(8 / 5))


def test_the_gradient_of_cross_entropy_is_softmax_minus_one_hot() -> None:
    logits = LOGITS.unsqueeze(0).clone().requires_grad_()

    logprobs = target_logprobs(logits, torch.tensor([1]))
    cross_entropy(logprobs, {"weights": torch.tensor([3.0])}).backward()

    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([3 / 8, 3 * (2 / 8 - 1), 3 * 5 / 8])


def _inputs(**changed: object) -> dict[str, np.ndarray]:
    inputs = {
        "target_tokens": np.array([1, 2, 3]),
        "weights": np.array([1, 1, 1], dtype=np.float32),
    }
    return {name: value for name, value in {**inputs, **changed}.items() if value is not None}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (_inputs(target_tokens=None), r"data\[7\] lacks loss_fn_inputs\['target_tokens'\]"),
        (_inputs(weights=np.ones(2, np.float32)), r"shape \[2\], but model_input has 3"),
        (_inputs(target_tokens=np.ones((3, 2), np.int64)), r"shape \[3, 2\]"),
        (_inputs(target_tokens=np.ones(3, np.float32)), r"'target_tokens'\] is float32"),
        (_inputs(weights=np.array([1, np.nan, 1], np.float32)), r"'weights'\] holds nan"),
    ],
)
def test_a_datum_the_loss_cannot_use_is_named(inputs: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(UserInputError, match=said):
        check_inputs("cross_entropy", {}, 7, 3, inputs)


def test_an_unserved_loss_names_the_served_ones() -> None:
    with pytest.raises(UserInputError, match=r"'nonsense' is not served.*cross_entropy"):
        check_inputs("nonsense", {}, 0, 3, _inputs())


def test_cross_entropy_takes_no_config() -> None:
    with pytest.raises(UserInputError, match=r"no loss_fn_config, got \['beta'\]"):
        check_inputs("cross_entropy", {"beta": 0.1}, 0, 3, _inputs())


def test_without_weights_every_token_counts_once() -> None:
    check_inputs("cross_entropy", {}, 0, 3, _inputs(weights=None))
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    assert cross_entropy(logprobs, {}).item() == 7.0
    assert cross_entropy(logprobs, {"weights": torch.ones(3)}).item() == 7.0
