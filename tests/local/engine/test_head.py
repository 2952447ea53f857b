from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tinker_local.engine import head as head_module
from tinker_local.engine.head import target_logprobs
from tinker_local.engine.lora import Factors, LoraLinear

HIDDEN, VOCABULARY, RANK, SCALE = 6, 11, 2, 4.0

# Three targets of state 0 (one of them twice), none of 1 and 4, one each of 2, 3 and 5;
# state 2's comes before state 0's second, and state 5's gradient is zero.
ROWS = torch.tensor([0, 2, 0, 3, 0, 5])
TARGETS = torch.tensor([4, 10, 7, 0, 4, 3])
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25, 0.0])


def _head(
    bias: bool = False, adapted: bool = True, dtype: torch.dtype = torch.float32
) -> LoraLinear:
    torch_state = torch.Generator().manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.normal_(0, 1, generator=torch_state)
    layer = LoraLinear(linear.to(dtype))
    if adapted:
        a = torch.randn(RANK, HIDDEN, generator=torch_state).requires_grad_()
        b = torch.randn(VOCABULARY, RANK, generator=torch_state).requires_grad_()
        layer.active, layer.scale = Factors(a, b), SCALE
    return layer


def _hidden(dtype: torch.dtype = torch.float32, rows: int = 6) -> torch.Tensor:
    drawn = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    return drawn.to(dtype).requires_grad_()


def _expected(hidden: torch.Tensor, head: LoraLinear) -> torch.Tensor:
    """log_softmax of all logits in float32, then the targets, as autograd follows it."""
    bias = None if head.base.bias is None else head.base.bias.float()
    logits = nn.functional.linear(hidden.float(), head.weight.float(), bias)
    if head.active is not None:
        logits = logits + SCALE * hidden.float() @ head.active.a.T @ head.active.b.T
    return logits.log_softmax(-1)[ROWS, TARGETS]


def _leaves(hidden: torch.Tensor, head: LoraLinear) -> list[torch.Tensor]:
    return [hidden] if head.active is None else [hidden, head.active.a, head.active.b]


@pytest.fixture(params=["loops", "operators"])
def softmax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head as on a CPU, and as on a GPU: torch's operators run on both."""
    if request.param == "operators":
        monkeypatch.setattr(head_module, "_has_loops", lambda _: False)


pytestmark = pytest.mark.usefixtures("softmax")


@pytest.mark.parametrize("rows_kept", [1024, 4])  # 6 rows: together, and in two pieces
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_scores_and_gradients_are_those_of_log_softmax_and_gather(
    monkeypatch: pytest.MonkeyPatch, rows_kept: int, bias: bool, adapted: bool
) -> None:
    monkeypatch.setattr(head_module, "_ROWS_KEPT", rows_kept)
    head, hidden = _head(bias, adapted), _hidden()

    ours = target_logprobs(hidden, ROWS, TARGETS, head)
    expected = _expected(hidden, head)

    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    leaves = _leaves(hidden, head)
    our_gradients = torch.autograd.grad((ours * WEIGHTS).sum(), leaves)
    gradients = torch.autograd.grad((expected * WEIGHTS).sum(), leaves)
    for one, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [33, 100])  # 32 rows are in float32 at once
def test_many_rows_have_the_gradient_of_autograd(rows: int) -> None:
    head, hidden = _head(), _hidden(rows=rows)
    targets = torch.arange(rows) % VOCABULARY
    weights = torch.linspace(-1, 1, rows) * (torch.arange(rows) % 3 > 0)  # every third is zero

    ours = target_logprobs(hidden, torch.arange(rows), targets, head)
    logits = hidden @ head.weight.T
    assert head.active is not None
    logits = logits + SCALE * hidden @ head.active.a.T @ head.active.b.T
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    leaves = _leaves(hidden, head)
    our_gradients = torch.autograd.grad((ours * weights).sum(), leaves)
    gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    for one, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_score_is_the_log_of_the_softmax() -> None:
    linear = nn.Linear(1, 3, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.tensor([[1.0], [2.0], [5.0]]).log())  # softmax 1/8, 2/8, 5/8

    scores = target_logprobs(
        torch.ones(1, 1), torch.tensor([0, 0]), torch.tensor([0, 2]), LoraLinear(linear)
    )

    assert scores.tolist() == pytest.approx([math.log(1 / 8), math.log(5 / 8)])


def test_rows_without_a_gradient_are_left_out_of_the_backward_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    to_gradient = head_module._to_gradient_

    def counted(*given: torch.Tensor) -> torch.Tensor:
        gradient = to_gradient(*given)
        seen.append(len(gradient))
        return gradient

    monkeypatch.setattr(head_module, "_to_gradient_", counted)
    hidden = _hidden()

    (target_logprobs(hidden, ROWS, TARGETS, _head()) * WEIGHTS).sum().backward()

    assert seen == [3]  # states 0, 2 and 3: 1 and 4 have no target, 5's weight is 0
    assert hidden.grad is not None
    assert hidden.grad.abs().sum(-1).gt(0).tolist() == [True, False, True, True, False, False]


def test_a_gradient_of_zero_everywhere_is_zero() -> None:
    hidden = _hidden()

    (target_logprobs(hidden, ROWS, TARGETS, _head()) * 0).sum().backward()

    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_opposite_gradients_of_two_targets_of_one_state_do_not_cancel() -> None:
    head, hidden = _head(), _hidden()

    pair = target_logprobs(hidden, torch.tensor([0, 0]), torch.tensor([4, 7]), head)
    (pair[0] - pair[1]).backward()

    assert head.active is not None
    whole = head.weight + SCALE * head.active.b @ head.active.a
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0], whole[4] - whole[7])  # logsumexp drops out


def test_of_bfloat16_states_scores_are_float32_and_gradients_within_two_percent() -> None:
    head, hidden = _head(dtype=torch.bfloat16), _hidden(torch.bfloat16)

    ours = target_logprobs(hidden, ROWS, TARGETS, head)
    expected = _expected(hidden, head)

    assert ours.dtype == torch.float32
    leaves = _leaves(hidden, head)
    our_gradients = torch.autograd.grad((ours * WEIGHTS).sum(), leaves)
    gradients = torch.autograd.grad((expected * WEIGHTS).sum(), leaves)
    for one, other in zip(our_gradients, gradients, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).float().norm() / other.float().norm()) < 0.02
