from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinker_local.engine.batches import Batch, plan
from tinker_local.ops import Tokens

# Few different first tokens and lengths, so that prefixes are shared by chance.
SEQUENCES = st.lists(
    st.builds(
        lambda start, size, end: [start] * size + end,
        st.integers(0, 2),
        st.sampled_from([0, 15, 16, 17, 40]),
        st.lists(st.integers(0, 3), min_size=1, max_size=30),
    ),
    max_size=25,
)


def _arrays(sequences: Sequence[Sequence[int]]) -> list[Tokens]:
    return [np.array(tokens, dtype=np.int64) for tokens in sequences]


def _plan(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[Batch]:
    return plan(_arrays(sequences), max_tokens)


def _completions(prompt: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Completions whose first tokens, 1000 and so on, differ."""
    return [[*prompt, *[1000 + place] * length] for place, length in enumerate(lengths)]


@given(SEQUENCES, st.integers(1, 200))
def test_every_sequence_is_in_exactly_one_batch(
    sequences: list[list[int]], max_tokens: int
) -> None:
    members = [index for batch in _plan(sequences, max_tokens) for index in batch.members]

    assert sorted(members) == list(range(len(sequences)))


@given(SEQUENCES, st.integers(1, 200))
def test_a_prefix_is_the_same_in_all_members_and_shorter_than_each(
    sequences: list[list[int]], max_tokens: int
) -> None:
    for batch in _plan(sequences, max_tokens):
        first = sequences[batch.members[0]]
        for index in batch.members:
            assert batch.prefix < len(sequences[index])
            assert sequences[index][: batch.prefix] == first[: batch.prefix]


@given(SEQUENCES, st.integers(1, 200))
def test_a_batch_of_several_computes_at_most_max_tokens_beside_its_prefix(
    sequences: list[list[int]], max_tokens: int
) -> None:
    for batch in _plan(sequences, max_tokens):
        own = [len(sequences[index]) - batch.prefix for index in batch.members]
        limit = max(max_tokens, batch.prefix)
        assert sum(own) <= limit or len(own) == 1
        # Attention pads to the longest.
        assert len(own) * max(own) <= 2 * limit or len(own) == 1


@given(SEQUENCES, st.integers(1, 200))
def test_a_prefix_of_its_own_has_at_least_16_tokens(
    sequences: list[list[int]], max_tokens: int
) -> None:
    assert {batch.prefix for batch in _plan(sequences, max_tokens)}.isdisjoint(range(1, 16))


def test_nothing_needs_no_batch() -> None:
    assert plan([], 100) == []


def test_neighbours_in_length_share_a_batch() -> None:
    lengths = [1, 9, 2, 10]
    sequences = [[place] * length for place, length in enumerate(lengths)]

    assert _plan(sequences, max_tokens=19) == [Batch((3, 1)), Batch((2, 0))]


def test_a_sequence_longer_than_the_limit_has_a_batch_of_its_own() -> None:
    assert _plan([[1] * 3, [2] * 50, [3] * 3], max_tokens=10) == [Batch((1,)), Batch((0, 2))]


def test_completions_of_one_prompt_share_a_batch_and_the_prompt() -> None:
    one = _completions(range(0, 100), [7, 5, 3])
    other = _completions(range(200, 260), [4, 6])
    mixed = [one[0], other[0], one[1], other[1], one[2]]

    batches = _plan(mixed, max_tokens=512)

    assert {(frozenset(batch.members), batch.prefix) for batch in batches} == {
        (frozenset({0, 2, 4}), 100),
        (frozenset({1, 3}), 60),
    }


def test_completions_that_do_not_fit_together_share_the_prompt_in_each_batch() -> None:
    batches = _plan(_completions(range(100), [60] * 4), max_tokens=120)

    assert [(len(batch.members), batch.prefix) for batch in batches] == [(2, 100), (2, 100)]


def test_a_prompt_of_15_tokens_is_not_shared() -> None:
    assert _plan(_completions(range(15), [4, 4]), 512) == [Batch((0, 1), 0)]
    assert _plan(_completions(range(16), [4, 4]), 512) == [Batch((0, 1), 16)]


TEMPLATE = list(range(500, 520))  # 20 tokens with which all prompts begin


def test_a_template_common_to_all_does_not_split_groups_from_their_prompts() -> None:
    one = _completions([*TEMPLATE, *range(0, 80)], [5] * 4)
    other = _completions([*TEMPLATE, *range(200, 280)], [5] * 4)

    batches = _plan([*one, *other], max_tokens=512)

    assert sorted((sorted(batch.members), batch.prefix) for batch in batches) == [
        ([0, 1, 2, 3], 100),
        ([4, 5, 6, 7], 100),
    ]


def test_a_lone_conversation_of_the_same_template_does_not_either() -> None:
    lone = [*TEMPLATE, *[1] * 90]  # sorted, it stands before the group
    group = _completions([*TEMPLATE, *range(200, 280)], [5] * 4)

    batches = _plan([lone, *group], max_tokens=512)

    assert (frozenset({1, 2, 3, 4}), 100) in {
        (frozenset(batch.members), batch.prefix) for batch in batches
    }


def test_conversations_that_share_a_template_alone_share_it() -> None:
    [batch] = _plan([[*TEMPLATE, *[place] * 10] for place in range(4)], max_tokens=512)

    assert (sorted(batch.members), batch.prefix) == ([0, 1, 2, 3], 20)


def test_identical_sequences_share_all_but_their_last_token() -> None:
    [batch] = _plan([[7] * 30] * 3, max_tokens=512)

    assert (sorted(batch.members), batch.prefix) == ([0, 1, 2], 29)


def test_a_sequence_that_is_the_beginning_of_another_keeps_a_token_of_its_own() -> None:
    [batch] = _plan([[7] * 20, [7] * 30], max_tokens=512)

    assert (sorted(batch.members), batch.prefix) == ([0, 1], 19)


def test_token_ids_sort_as_numbers_however_large() -> None:
    # As little-endian bytes, 256 would come before 1 and part the group of 1s.
    group = [[1] * 20 + [2], [1] * 20 + [300], [1] * 20 + [70_000]]
    others = [[256] * 5, [2] * 5, [65_536] * 5]

    batches = _plan([*group, *others], max_tokens=512)

    assert (frozenset({0, 1, 2}), 20) in {
        (frozenset(batch.members), batch.prefix) for batch in batches
    }
