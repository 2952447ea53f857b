from __future__ import annotations

import math

import pytest
import torch

from tinker_local.engine.optimizer import AdamW
from tinker_local.errors import UserInputError
from tinker_local.ops import AdamParams

PARAMS = AdamParams(
    learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.5, grad_clip_norm=2.0
)


def _by_hand(theta: list[float], gradients: list[list[float]]) -> list[float]:
    """Two steps of "Decoupled Weight Decay Regularization", algorithm 2, with PARAMS."""
    m, v = [0.0, 0.0], [0.0, 0.0]
    for t, raw in enumerate(gradients, start=1):
        clip = min(1.0, 2.0 / (math.hypot(*raw) + 1e-6))
        for i in range(2):
            g = raw[i] * clip
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.9 * v[i] + 0.1 * g * g
            theta[i] -= 0.1 * 0.5 * theta[i]
            m_hat, v_hat = m[i] / (1 - 0.8**t), v[i] / (1 - 0.9**t)
            theta[i] -= 0.1 * m_hat / (math.sqrt(v_hat) + 1e-8)
    return theta


def test_two_steps_with_decay_and_clipping_follow_the_formula() -> None:
    parameter = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = AdamW([parameter])
    gradients = [[3.0, 4.0], [-0.5, 1.0]]  # norms 5 (clipped to 2) and 1.118 (left alone)

    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step(PARAMS)

    assert parameter.tolist() == pytest.approx(_by_hand([1.0, -2.0], gradients), abs=1e-6)


def test_steps_whose_rate_changes_equal_torch() -> None:
    ours, theirs = (torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True) for _ in range(2))
    optimizer = AdamW([ours])
    reference = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1)

    for rate, gradient in ((0.1, [1.0, 2.0, -3.0]), (0.02, [0.0, 1.0, 1.0])):
        ours.grad, theirs.grad = torch.tensor([gradient]), torch.tensor([gradient])
        optimizer.step(AdamParams(learning_rate=rate, weight_decay=0.1))
        reference.param_groups[0]["lr"] = rate
        reference.step()

    assert torch.equal(ours, theirs)


def test_the_norm_is_reported_as_it_was_before_clipping() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([3.0, 4.0])

    assert AdamW([parameter]).step(PARAMS) == {"grad_norm": 5.0}


def test_a_clip_norm_of_zero_clips_nothing() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = AdamW([parameter])
    parameter.grad = torch.tensor([3.0, 4.0])

    optimizer.step(AdamParams(beta1=0.5, grad_clip_norm=0.0))

    assert optimizer.state()["exp_avg"][0].tolist() == [1.5, 2.0]


def test_a_step_clears_the_gradient() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)

    AdamW([parameter]).step(AdamParams())

    assert parameter.grad is None


def test_a_step_without_a_gradient_asks_for_forward_backward() -> None:
    with pytest.raises(UserInputError, match=r"no gradient to apply.*forward_backward"):
        AdamW([torch.zeros(2, requires_grad=True)]).step(AdamParams())


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (AdamParams(learning_rate=-1e-4), "learning_rate is -0.0001"),
        (AdamParams(learning_rate=math.nan), "learning_rate is nan"),
        (AdamParams(beta1=1.0), "beta1 is 1.0"),
        (AdamParams(grad_clip_norm=-1.0), "grad_clip_norm is -1.0"),
    ],
)
def test_a_value_adam_cannot_use_is_refused_and_the_gradient_kept(
    params: AdamParams, said: str
) -> None:
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)

    with pytest.raises(UserInputError, match=said):
        AdamW([parameter]).step(params)

    assert parameter.grad is not None


def test_a_gradient_that_is_not_finite_takes_no_step() -> None:
    parameter = torch.ones(2, requires_grad=True)
    parameter.grad = torch.tensor([1.0, math.inf])

    with pytest.raises(UserInputError, match="gradient's norm is inf"):
        AdamW([parameter]).step(AdamParams())

    assert parameter.tolist() == [1.0, 1.0]
    assert parameter.grad is None
