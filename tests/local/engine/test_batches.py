from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tinker_local.engine.batches import pack

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(LENGTHS, st.integers(1, 100))
def test_every_example_is_in_exactly_one_group(lengths: list[int], max_tokens: int) -> None:
    indices = [index for group in pack(lengths, max_tokens) for index in group]

    assert sorted(indices) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 100))
def test_a_group_of_several_fits_the_limit_when_padded(lengths: list[int], max_tokens: int) -> None:
    for group in pack(lengths, max_tokens):
        padded = len(group) * max(lengths[index] for index in group)
        assert padded <= max_tokens or len(group) == 1


def test_neighbours_in_length_share_a_group() -> None:
    assert pack([1, 9, 2, 10], max_tokens=20) == [[3, 1], [2, 0]]
