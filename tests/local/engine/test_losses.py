from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from tinker_local.engine.losses import LOSSES, cross_entropy, target_logprobs

# softmax of log(1, 2, 5) is 1/8, 2/8, 5/8
LOGITS = torch.tensor([1.0, 2.0, 5.0]).log()

# Three tokens: the ratios p / q are 2, 1 and 1/4.
P = np.array([1 / 2, 1 / 4, 1 / 8])
Q = np.array([1 / 4, 1 / 4, 1 / 2])
A = np.array([1.0, -2.0, 3.0])
MASK = np.array([1.0, 0.0, 1.0])
S = math.sqrt(2 / 4)  # of gspo: the geometric mean of the first and the last ratio, 0.707

CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
WIDE = {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}

# loss -> (config, value, derivative by each log-probability), worked out by hand
CLOSED_FORMS: Mapping[str, tuple[Mapping[str, float], float, list[float]]] = {
    "importance_sampling": ({}, -(2 * 1 + 1 * -2 + 0.25 * 3), [-2.0, 2.0, -0.75]),
    # 2 is cut to 1.2 and stops; 1 is inside; min(0.25 * 3, 0.8 * 3) is the unclipped one
    "ppo": (CLIP, -(1.2 * 1 + 1 * -2 + 0.25 * 3), [0.0, 2.0, -0.75]),
    # 2 is cut to 1.5 and 0.25 raised to 0.5, and all go on
    "cispo": (
        WIDE,
        -(1.5 * 1 * math.log(1 / 2) + 1 * -2 * math.log(1 / 4) + 0.5 * 3 * math.log(1 / 8)),
        [-1.5, 2.0, -1.5],
    ),
    # lp - q is log 2, 0 and -log 4
    "dro": (
        {"beta": 0.1},
        -(math.log(1 / 2) - 2 * math.log(1 / 4) + 3 * math.log(1 / 8))
        + 0.05 * (math.log(2) ** 2 + math.log(4) ** 2),
        [-(1 - 0.1 * math.log(2)), 2.0, -(3 + 0.1 * math.log(4))],
    ),
    # 0.707 is below 0.8: only the negative advantage is clipped
    "gspo": (CLIP, -(S * 1 + 0.8 * -2 + S * 3), [-S, 0.0, -3 * S]),
}


def _inputs(**changed: np.ndarray) -> dict[str, torch.Tensor]:
    inputs = {"logprobs": np.log(Q), "advantages": A, "sequence_ratio_mask": MASK, **changed}
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def _logprobs(values: np.ndarray = P) -> torch.Tensor:
    return torch.from_numpy(np.log(values)).requires_grad_()


def _gradient(
    loss_fn: str, lp: torch.Tensor, config: Mapping[str, float], /, **inputs: np.ndarray
) -> list[float]:
    loss = LOSSES[loss_fn].function(lp, _inputs(**inputs), config)
    [gradient] = torch.autograd.grad(loss, lp)
    return gradient.tolist()  # type: ignore[no-any-return]


def test_target_logprobs_are_the_log_of_the_softmax() -> None:
    logits = LOGITS.expand(3, 3)

    scores = target_logprobs(logits, torch.tensor([0, 1, 2]))

    assert scores.tolist() == pytest.approx([math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)])


def test_target_logprobs_of_several_targets_keep_their_places() -> None:
    scores = target_logprobs(LOGITS.expand(2, 3), torch.tensor([[2, 0], [1, 1]]))

    expected = np.log([[5 / 8, 1 / 8], [2 / 8, 2 / 8]])
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6)


def test_target_logprobs_do_not_change_when_all_logits_shift() -> None:
    targets = torch.tensor([2])

    scores = target_logprobs(LOGITS.unsqueeze(0) + 80.0, targets)

    assert scores.item() == pytest.approx(math.log(5 / 8), abs=1e-5)


def test_target_logprobs_of_bfloat16_logits_are_float32() -> None:
    assert target_logprobs(LOGITS.bfloat16().unsqueeze(0), torch.tensor([0])).dtype == torch.float32


def test_cross_entropy_is_the_weighted_sum_over_tokens_not_their_mean() -> None:
    logprobs = torch.tensor([1 / 8, 2 / 8, 5 / 8]).log()

    loss = cross_entropy(logprobs, {"weights": torch.tensor([2.0, 0.0, 0.5])}, {})

    assert loss.item() == pytest.approx(2 * math.log(8) + 0.5 * math.log(8 / 5))


def test_the_gradient_of_cross_entropy_is_softmax_minus_one_hot() -> None:
    logits = LOGITS.unsqueeze(0).clone().requires_grad_()

    logprobs = target_logprobs(logits, torch.tensor([1]))
    cross_entropy(logprobs, {"weights": torch.tensor([3.0])}, {}).backward()

    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([3 / 8, 3 * (2 / 8 - 1), 3 * 5 / 8])


def test_the_gradient_of_a_soft_label_is_softmax_minus_the_label() -> None:
    logits = LOGITS.unsqueeze(0).clone().requires_grad_()

    logprobs = target_logprobs(logits, torch.tensor([[0, 2]]))
    cross_entropy(logprobs, {"weights": torch.tensor([[0.75, 0.25]])}, {}).backward()

    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([1 / 8 - 0.75, 2 / 8, 5 / 8 - 0.25])


def test_without_weights_every_token_counts_once() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0])

    assert cross_entropy(logprobs, {}, {}).item() == 7.0
    assert cross_entropy(logprobs, {"weights": torch.ones(3)}, {}).item() == 7.0


@pytest.mark.parametrize("loss_fn", CLOSED_FORMS)
def test_a_loss_is_its_closed_formula_on_three_tokens(loss_fn: str) -> None:
    config, expected, _ = CLOSED_FORMS[loss_fn]

    loss = LOSSES[loss_fn].function(_logprobs(), _inputs(), config)

    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss_fn", CLOSED_FORMS)
def test_a_gradient_is_the_one_derived_by_hand(loss_fn: str) -> None:
    config, _, expected = CLOSED_FORMS[loss_fn]

    assert _gradient(loss_fn, _logprobs(), config) == pytest.approx(expected, rel=1e-12)


def test_every_loss_on_samples_has_a_closed_formula_here() -> None:
    assert set(CLOSED_FORMS) == set(LOSSES) - {"cross_entropy"}


# cispo and gspo are left out: they stop gradients on purpose.
@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "dro"])
def test_a_gradient_equals_finite_differences(loss_fn: str) -> None:
    config, _, _ = CLOSED_FORMS[loss_fn]

    assert torch.autograd.gradcheck(
        lambda logprobs: LOSSES[loss_fn].function(logprobs, _inputs(), config), [_logprobs()]
    )


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_on_the_samplers_own_policy_the_gradient_is_minus_the_advantage(loss_fn: str) -> None:
    config, _, _ = CLOSED_FORMS[loss_fn]

    gradient = _gradient(loss_fn, _logprobs(Q), config)

    assert gradient == pytest.approx((-A).tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "pushes"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False)],
)
def test_ppo_stops_pushing_once_the_ratio_leaves_the_clip_range(
    ratio: float, advantage: float, pushes: bool
) -> None:
    [gradient] = _gradient(
        "ppo",
        _logprobs(np.array([0.1 * ratio])),
        CLIP,
        logprobs=np.log([0.1]),
        advantages=np.array([advantage]),
    )

    assert gradient == pytest.approx(-ratio * advantage if pushes else 0.0)


def test_cispo_goes_on_pushing_where_ppo_has_stopped() -> None:
    ppo, cispo = (_gradient(loss_fn, _logprobs(), CLIP)[0] for loss_fn in ("ppo", "cispo"))

    assert (ppo, cispo) == (0.0, pytest.approx(-1.2))


def test_gspo_equals_the_sequence_level_gradient_where_the_advantage_is_constant() -> None:
    """The paper's sequence objective: s * A, once for every token of the sequence."""
    logprobs = _logprobs()
    everywhere = {"clip_low_threshold": 0.0, "clip_high_threshold": 9.0}
    s = (logprobs - torch.from_numpy(np.log(Q))).mean().exp()
    [expected] = torch.autograd.grad(-3 * s * 2.0, logprobs)

    gradient = _gradient(
        "gspo",
        _logprobs(),
        everywhere,
        advantages=np.full(3, 2.0),
        sequence_ratio_mask=np.ones(3),
    )

    assert gradient == pytest.approx(expected.tolist(), rel=1e-12)


def test_gspo_takes_its_ratio_from_the_masked_tokens_alone() -> None:
    elsewhere = np.log([1 / 4, 1e-30, 1 / 2])  # only the token outside the mask changes

    changed = _gradient("gspo", _logprobs(), CLIP, logprobs=elsewhere)

    assert changed == _gradient("gspo", _logprobs(), CLIP)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_a_placeholder_where_the_advantage_is_zero_changes_nothing(loss_fn: str) -> None:
    config, _, _ = CLOSED_FORMS[loss_fn]
    advantages = np.array([1.0, 0.0, 3.0])
    placeholder = np.array([math.log(1 / 4), -99999.0, math.log(1 / 2)])  # exp(99999) overflows

    gradient = _gradient(loss_fn, _logprobs(), config, advantages=advantages, logprobs=placeholder)

    assert gradient[1] == 0.0
    assert gradient == _gradient(loss_fn, _logprobs(), config, advantages=advantages)


@pytest.mark.parametrize(("loss_fn", "expected"), [("ppo", 0.0), ("gspo", 0.0), ("cispo", -1.2)])
def test_a_ratio_that_overflows_but_is_clipped_leaves_a_finite_gradient(
    loss_fn: str, expected: float
) -> None:
    """exp(1000 - log 10) is infinite; above the threshold its value does not matter."""
    inputs = {name: np.ones(1) for name in ("advantages", "sequence_ratio_mask")}

    [gradient] = _gradient(
        loss_fn, _logprobs(np.array([0.1])), CLIP, logprobs=np.array([-1000.0]), **inputs
    )

    assert gradient == pytest.approx(expected)


@pytest.mark.parametrize(("loss_fn", "clipped"), [("ppo", 2), ("cispo", 2), ("gspo", 3)])
def test_clipped_tokens_are_counted(loss_fn: str, clipped: int) -> None:
    metrics = LOSSES[loss_fn].metrics(_logprobs(), _inputs(), CLIP)

    assert {name: int(value) for name, value in metrics.items()} == {"clipped_tokens:sum": clipped}


def test_tokens_without_an_advantage_do_not_count_as_clipped() -> None:
    inputs = _inputs(advantages=np.array([0.0, -2.0, 3.0]))

    assert int(LOSSES["ppo"].metrics(_logprobs(), inputs, CLIP)["clipped_tokens:sum"]) == 1


@pytest.mark.parametrize("loss_fn", CLOSED_FORMS)
def test_whole_numbers_are_as_good_as_floats(loss_fn: str) -> None:
    config, _, _ = CLOSED_FORMS[loss_fn]
    whole = {"advantages": A.astype(np.int64), "sequence_ratio_mask": MASK.astype(np.int64)}

    gradient = _gradient(loss_fn, _logprobs(), config, **whole)

    assert gradient == _gradient(loss_fn, _logprobs(), config)
