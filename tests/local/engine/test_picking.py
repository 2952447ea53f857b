from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tinker_local.engine.picking import Choice, Picked, draw, pick
from tinker_local.errors import UserInputError

P = [0.1, 0.5, 0.15, 0.25]


def _choice(number: float, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0) -> Choice:
    return Choice(temperature, top_k, top_p, number)


def _pick(*choices: Choice) -> Picked:
    """One row a choice, all with the probabilities P."""
    return pick(torch.tensor([P] * len(choices)).log(), choices)


def test_the_number_says_where_in_the_cumulated_probability_the_choice_falls() -> None:
    # cumulated: 0.1, 0.6, 0.75, 1
    numbers = [0.0, 0.099, 0.101, 0.599, 0.601, 0.749, 0.751, 1 - 1e-12]

    picked = _pick(*(_choice(number) for number in numbers))

    assert picked.tokens == [0, 0, 1, 1, 2, 2, 3, 3]
    assert picked.logprobs == pytest.approx([math.log(P[token]) for token in picked.tokens])


def test_a_token_without_probability_is_never_chosen() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2)

    assert pick(logits, [_choice(0.0), _choice(1 - 1e-12)]).tokens == [1, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_many_picks_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    rows, vocabulary = 30_000, 20
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    numbers = np.random.default_rng(0).random(rows)

    picked = pick(logits.repeat(rows, 1), [_choice(float(n), temperature) for n in numbers])

    observed = np.bincount(picked.tokens, minlength=vocabulary)
    expected = (logits / temperature).softmax(-1).numpy() * rows
    assert expected.min() > 5  # chi-square needs so many
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = vocabulary - 1  # the mean of chi-square; its deviation is sqrt(2 * freedom)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_rows_at_several_temperatures_are_scored_each_at_its_own() -> None:
    picked = _pick(_choice(0.9, 1.0), _choice(0.9, 0.0), _choice(0.9, 0.5), _choice(0.0, 0.0))

    squares = [p * p for p in P]  # temperature 1/2; 0.345 in all, 3 from 0.8188 on
    assert picked.tokens == [3, 1, 3, 1]
    expected = [0.25, 0.5, squares[3] / sum(squares), 0.5]
    assert picked.logprobs == pytest.approx([math.log(p) for p in expected])


def test_top_k_and_top_p_cut_each_row_by_itself() -> None:
    # Kept: 1 and 3 (0.75 of the mass), 1 alone, 1 and 3 again, 1 to 3 (0.9), everything.
    last = 0.999
    choices = [
        _choice(last, top_k=2),
        _choice(last, top_k=1),
        _choice(0.6, top_p=0.7),  # 0.45 of 0.75: still token 1
        _choice(0.0, top_k=3),
        _choice(0.0),
    ]

    picked = _pick(*choices)

    assert picked.tokens == [3, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_p": 0.7}, {1: 0.5, 3: 0.25}),  # the smallest set with the mass
        ({"top_p": 0.5}, {1: 0.5}),
        ({"top_k": 3}, {1: 0.5, 2: 0.15, 3: 0.25}),
        ({"top_k": 3, "top_p": 0.6}, {1: 0.5, 3: 0.25}),
        ({"top_k": 99}, dict(enumerate(P))),
        ({"top_p": 1e-6}, {1: 0.5}),
    ],
)
def test_a_cut_row_is_drawn_from_what_is_kept_in_its_proportions(
    cut: dict[str, float], kept: dict[int, float]
) -> None:
    steps = 1000
    choices = [
        Choice(1.0, int(cut.get("top_k", -1)), cut.get("top_p", 1.0), (i + 0.5) / steps)
        for i in range(steps)
    ]

    counts = np.bincount(_pick(*choices).tokens, minlength=4)

    mass = sum(kept.values())
    expected = [steps * kept.get(token, 0.0) / mass for token in range(4)]
    np.testing.assert_allclose(counts, expected, atol=1.01)
    assert all(counts[token] == 0 for token in range(4) if token not in kept)


def test_a_cut_does_not_change_the_logprob() -> None:
    picked = _pick(_choice(0.5, top_k=1))

    assert picked.logprobs == pytest.approx([math.log(0.5)])
    assert picked.all_logprobs.exp().tolist() == [pytest.approx(P)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])

    with pytest.raises(UserInputError, match="weights have diverged"):
        pick(logits, [_choice(0.5), _choice(0.5)])


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logprobs = torch.tensor([P, P[::-1]]).log()
    first, second = (draw(logprobs, 5000, torch.Generator().manual_seed(3)) for _ in range(2))

    assert torch.equal(first, second)
    for row, expected in zip(first, (P, P[::-1]), strict=True):
        # 5000 draws: a share's deviation is at most sqrt(0.25 / 5000) = 0.007
        np.testing.assert_allclose(np.bincount(row, minlength=4) / 5000, expected, atol=0.035)
