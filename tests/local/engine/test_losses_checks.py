"""What a loss refuses, and how it says so."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tinker_local.engine.loss_checks import (
    check_finite,
    check_inputs,
    complete_config,
    loss_spec,
)
from tinker_local.errors import LocalError, NotServedError, UserInputError

LOW, HIGH = "clip_low_threshold", "clip_high_threshold"


def _inputs(**changed: object) -> dict[str, np.ndarray]:
    inputs = {
        "target_tokens": np.array([1, 2, 3]),
        "weights": np.array([1, 1, 1], dtype=np.float32),
    }
    return {name: value for name, value in {**inputs, **changed}.items() if value is not None}  # type: ignore[misc]


def _samples(**changed: object) -> dict[str, np.ndarray]:
    ones = np.ones(3, np.float32)
    return _inputs(
        **{"logprobs": -ones, "advantages": ones, "sequence_ratio_mask": ones, **changed}
    )


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (_inputs(target_tokens=None), r"data\[7\] lacks loss_fn_inputs\['target_tokens'\]"),
        (_inputs(weights=np.ones(2, np.float32)), r"shape \[2\], but model_input has 3"),
        (
            _inputs(target_tokens=np.ones((3, 2), np.int64)),
            r"'weights'\] has shape \[3\]",
        ),
        (_inputs(target_tokens=np.ones((2, 2), np.int64)), r"'target_tokens'\] has shape \[2, 2\]"),
        (_inputs(target_tokens=np.ones((3, 0), np.int64)), r"has shape \[3, 0\].*\[3, K\]"),
        (_inputs(target_tokens=np.ones((3, 1, 1), np.int64)), r"has shape \[3, 1, 1\]"),
        (_inputs(weights=np.ones((3, 2), np.float32)), r"'weights'\] has shape \[3, 2\]"),
        (_inputs(target_tokens=np.ones(3, np.float32)), r"'target_tokens'\] is float32"),
        (_inputs(weights=np.array([1, np.nan, 1], np.float32)), r"'weights'\] holds nan"),
    ],
)
def test_a_datum_cross_entropy_cannot_use_is_named(
    inputs: dict[str, np.ndarray], said: str
) -> None:
    with pytest.raises(UserInputError, match=said):
        check_inputs("cross_entropy", 7, 3, inputs)


@pytest.mark.parametrize(
    ("loss_fn", "inputs", "said"),
    [
        (
            "ppo",
            _samples(logprobs=None),
            r"data\[7\] lacks .*'logprobs'\], which ppo",
        ),
        ("dro", _samples(advantages=None), r"lacks loss_fn_inputs\['advantages'\]"),
        ("gspo", _samples(sequence_ratio_mask=None), r"lacks .*'sequence_ratio_mask'"),
        ("gspo", _samples(sequence_ratio_mask=np.zeros(3)), "0 throughout"),
        ("gspo", _samples(sequence_ratio_mask=np.array([1, -1, 1])), "negative somewhere"),
        ("cispo", _samples(target_tokens=np.ones((3, 2), np.int64)), r"shape \[3, 2\]"),
        ("ppo", _samples(logprobs=np.array([-1, -np.inf, -1])), r"'logprobs'\] holds -inf"),
        ("ppo", _samples(**{LOW: np.full(3, 0.9)}), "Give clip_low_threshold in loss_fn_config"),
    ],
)
def test_a_datum_a_loss_on_samples_cannot_use_is_named(
    loss_fn: str, inputs: dict[str, np.ndarray], said: str
) -> None:
    with pytest.raises(UserInputError, match=said):
        check_inputs(loss_fn, 7, 3, inputs)


def test_inputs_a_loss_does_not_read_are_ignored_whatever_they_hold() -> None:
    check_inputs("importance_sampling", 0, 3, _samples(weights=np.full(9, np.nan)))
    check_inputs("cross_entropy", 0, 3, _samples())


def test_cross_entropy_takes_several_targets_with_or_without_weights() -> None:
    targets = np.ones((3, 2), np.int64)

    check_inputs("cross_entropy", 0, 3, {"target_tokens": targets})
    check_inputs("cross_entropy", 0, 3, {"target_tokens": targets, "weights": np.ones((3, 2))})


def test_an_unknown_loss_names_the_served_ones() -> None:
    with pytest.raises(UserInputError, match=r"'nonsense' is not served.*cross_entropy.*gspo"):
        loss_spec("nonsense")


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        ("stable_reinforce", "publishes no formula"),
        ("custom", "Call forward_backward_custom"),
    ],
)
def test_a_loss_of_tinkers_that_is_not_served_says_why(loss_fn: str, said: str) -> None:
    with pytest.raises(NotServedError, match=said):
        complete_config(loss_fn, {"kl_coeff": 1.0})


@pytest.mark.parametrize(
    ("loss_fn", "config"),
    [
        ("cross_entropy", {}),
        ("importance_sampling", {}),
        ("ppo", {LOW: 0.8, HIGH: 1.2}),
        ("cispo", {LOW: 0.0, HIGH: 4.0}),
    ],
)
def test_the_defaults_are_tinkers(loss_fn: str, config: dict[str, float]) -> None:
    assert complete_config(loss_fn, {}) == config


def test_one_threshold_given_leaves_the_other_at_its_default() -> None:
    assert complete_config("ppo", {HIGH: 1.28}) == {LOW: 0.8, HIGH: 1.28}


@pytest.mark.parametrize(
    ("loss_fn", "config", "missing"),
    [
        ("dro", {}, "['beta']"),
        ("gspo", {}, f"['{LOW}', '{HIGH}']"),
        ("gspo", {LOW: 0.9997}, f"['{HIGH}']"),
    ],
)
def test_a_default_that_tinker_does_not_document_is_asked_for(
    loss_fn: str, config: dict[str, float], missing: str
) -> None:
    said = f"{loss_fn} needs loss_fn_config {missing}: Tinker does not document its default"

    with pytest.raises(UserInputError, match=re.escape(said)):
        complete_config(loss_fn, config)


@pytest.mark.parametrize(
    ("loss_fn", "config", "said"),
    [
        ("cross_entropy", {"beta": 0.1}, r"takes no loss_fn_config, got \['beta'\]"),
        ("ppo", {"epsilon": 0.2}, r"no loss_fn_config \['epsilon'\].*clip_low_threshold"),
        ("ppo", {LOW: "0.8"}, r"'clip_low_threshold'\] is '0.8', no number"),
        ("ppo", {HIGH: float("inf")}, r"'clip_high_threshold'\] is inf"),
        ("dro", {"beta": float("nan")}, r"'beta'\] is nan"),
        ("dro", {"beta": -0.1}, r"'beta'\] is -0.1"),
        ("ppo", {LOW: 0.2, HIGH: 0.2}, r"0.2 is not below clip_high_threshold 0.2.*ratios"),
        ("ppo", {LOW: 1.5}, r"1.5 is not below clip_high_threshold 1.2"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_name(
    loss_fn: str, config: dict[str, float | str], said: str
) -> None:
    with pytest.raises(UserInputError, match=said):
        complete_config(loss_fn, config)


@pytest.mark.parametrize("loss", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_overflowed_names_its_datum(loss: float) -> None:
    with pytest.raises(LocalError, match=r"importance_sampling of data\[5\] is"):
        check_finite("importance_sampling", [2, 5], [1.0, loss])
