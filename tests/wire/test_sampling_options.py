"""Every option of a sample request, asked with the real SDK over loopback."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from servers import LocalServer
from tiny_data import TINY, tokens_of

BOUND_S = 30.0
TEXT = "the cat sat on the mat"
TOKENS = tokens_of(TEXT)
PROMPT = types.ModelInput.from_ints(TOKENS)
SIZE = len(TOKENS)
VOCABULARY = 259
MISSING = -99999.0  # what the SDK holds for a logprob that is not there
GREEDY = types.SamplingParams(max_tokens=12, temperature=0, stop=[])


@pytest.fixture(scope="module")
def base(service_client: tinker.ServiceClient) -> tinker.SamplingClient:
    return service_client.create_sampling_client(base_model=TINY).result(BOUND_S)


@pytest.fixture(scope="module")
def expected(base: tinker.SamplingClient) -> np.ndarray:
    """log p of every token at every place of the prompt, (SIZE - 1, VOCABULARY)."""
    top = _ask(base, topk_prompt_logprobs=VOCABULARY).topk_prompt_logprobs_np
    assert top is not None
    table = np.full((SIZE, VOCABULARY), np.nan, np.float32)
    np.put_along_axis(table, top.token_ids, top.logprobs, axis=1)
    np.testing.assert_allclose(np.exp(table[1:]).sum(1), 1, rtol=1e-4)
    return table[1:]


def _ask(client: tinker.SamplingClient, num_samples: int = 1, **options: Any) -> Any:
    params = options.pop("params", types.SamplingParams(max_tokens=1, seed=1))
    return client.sample(PROMPT, num_samples, params, **options).result(BOUND_S)


def _active(server: LocalServer) -> int:
    answer = httpx.get(f"{server.base_url}/stats", headers={"X-API-Key": server.api_key})
    return int(answer.json()["active_sample_requests"])


def _wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + BOUND_S
    while not is_so():
        assert time.monotonic() < give_up_at


def test_prompt_logprobs_are_those_of_the_prompts_own_tokens(
    base: tinker.SamplingClient, expected: np.ndarray
) -> None:
    scored = _ask(base, include_prompt_logprobs=True).prompt_logprobs

    assert scored[0] is None
    np.testing.assert_allclose(
        np.array(scored[1:], float), expected[np.arange(SIZE - 1), TOKENS[1:]], atol=1e-5
    )
    assert base.compute_logprobs(PROMPT).result(BOUND_S) == pytest.approx(scored, abs=1e-5)


def test_what_is_not_asked_for_is_not_there(base: tinker.SamplingClient) -> None:
    response = _ask(base)

    assert response.prompt_logprobs is None
    assert response.topk_prompt_logprobs is None
    assert response.target_prompt_logprobs is None
    assert response.prompt_alt_tokens is None
    assert response.sequences[0].topk_logprobs is None


def test_the_likeliest_tokens_at_each_place_of_the_prompt_come_best_first(
    base: tinker.SamplingClient, expected: np.ndarray
) -> None:
    top = _ask(base, topk_prompt_logprobs=3).topk_prompt_logprobs_np

    assert top.token_ids.shape == top.logprobs.shape == (SIZE, 3)
    assert (top.token_ids[0] == 0).all()  # nothing predicts the first token
    assert (top.logprobs[0] == MISSING).all()
    best = -np.sort(-expected, axis=1)[:, :3]
    np.testing.assert_allclose(top.logprobs[1:], best, atol=1e-5)


def test_the_likeliest_tokens_beside_each_sampled_one(base: tinker.SamplingClient) -> None:
    [sequence] = _ask(base, params=GREEDY, topk_sample_logprobs=4).sequences

    assert sequence.topk_logprobs is not None
    assert [len(place or ()) for place in sequence.topk_logprobs] == [4] * 12
    best = [place[0] for place in sequence.topk_logprobs if place]
    assert [token for token, _ in best] == sequence.tokens
    assert [logprob for _, logprob in best] == pytest.approx(sequence.logprobs, abs=1e-5)


def test_two_requests_that_ask_for_different_numbers_get_their_own(
    base: tinker.SamplingClient,
) -> None:
    asked = [base.sample(PROMPT, 1, GREEDY, topk_sample_logprobs=count) for count in (0, 2, 5)]

    sequences = [future.result(BOUND_S).sequences[0] for future in asked]

    assert sequences[0].topk_logprobs is None
    for count, sequence in zip((2, 5), sequences[1:], strict=True):
        assert {len(place or ()) for place in sequence.topk_logprobs or ()} == {count}


def test_dense_targets_are_scored_where_they_are_asked(
    base: tinker.SamplingClient, expected: np.ndarray
) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (SIZE - 1, 2))
    ids[3] = -1
    ids[5, 1] = -1
    targets = types.TensorData(ids, "int64", list(ids.shape))

    scored = _ask(base, target_prompt_logprobs=targets).target_prompt_logprobs

    wanted = np.take_along_axis(expected, ids.clip(0), axis=1)
    wanted[ids == -1] = 0.0
    assert (scored.dtype, scored.shape) == ("float32", [SIZE - 1, 2])
    assert scored.sparse_crow_indices is None
    np.testing.assert_allclose(scored.to_numpy(), wanted, atol=1e-5)


def test_sparse_targets_are_scored_in_the_same_layout(
    base: tinker.SamplingClient, expected: np.ndarray
) -> None:
    # Row 1 asks for token 0 and for "a", row 4 for "z".
    crow = [0, 0, 2, 2, 2, 3, *[3] * (SIZE - 6)]
    targets = types.TensorData(
        [0, 97, 122],
        "int64",
        [SIZE - 1, 4],
        sparse_crow_indices=crow,
        sparse_col_indices=[0, 2, 3],
    )

    scored = _ask(base, target_prompt_logprobs=targets).target_prompt_logprobs

    assert (scored.dtype, scored.shape) == ("float32", [SIZE - 1, 4])
    assert (scored.sparse_crow_indices, scored.sparse_col_indices) == (crow, [0, 2, 3])
    wanted = [expected[1, 0], expected[1, 97], expected[4, 122]]
    assert scored.data == pytest.approx(wanted, abs=1e-5)


def test_the_last_n_alone_are_scored_where_that_is_asked(
    base: tinker.SamplingClient, expected: np.ndarray
) -> None:
    response = _ask(
        base, include_prompt_logprobs=True, prompt_logprobs_last_n=5, topk_prompt_logprobs=2
    )

    own = expected[np.arange(SIZE - 1), TOKENS[1:]]
    assert response.prompt_logprobs[:-5] == [None] * (SIZE - 5)
    assert response.prompt_logprobs[-5:] == pytest.approx(own[-5:], abs=1e-5)
    assert response.topk_prompt_logprobs[:-5] == [None] * (SIZE - 5)
    assert all(len(place) == 2 for place in response.topk_prompt_logprobs[-5:])
    only = base.compute_logprobs(PROMPT, prompt_logprobs_last_n=5).result(BOUND_S)
    assert only == pytest.approx(response.prompt_logprobs, abs=1e-5)


def test_alternatives_are_drawn_at_each_place_with_their_logprobs(
    base: tinker.SamplingClient, expected: np.ndarray
) -> None:
    drawn = _ask(base, prompt_alt_tokens_k=6).prompt_alt_tokens

    tokens, logprobs = drawn.tokens.to_numpy(), drawn.logprobs.to_numpy()
    assert tokens.shape == logprobs.shape == (SIZE - 1, 6)
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, tokens, 1), atol=1e-5)


def test_alternatives_at_temperature_0_are_the_likeliest_token(
    base: tinker.SamplingClient, expected: np.ndarray
) -> None:
    drawn = _ask(base, params=GREEDY, prompt_alt_tokens_k=2).prompt_alt_tokens

    best = expected.argmax(1)
    assert drawn.tokens.tolist() == [[token, token] for token in best]


def test_a_sequence_ends_with_the_token_that_completes_a_stop_string(
    base: tinker.SamplingClient,
) -> None:
    stop = ["e", "a ", "zq"]

    sequences = _ask(
        base, 16, params=types.SamplingParams(max_tokens=200, seed=3, stop=stop)
    ).sequences

    assert {sequence.stop_reason for sequence in sequences} == {"stop", "length"}
    for sequence in sequences:
        text = bytes(token for token in sequence.tokens if token < 256).decode(errors="replace")
        has_end = sequence.tokens[-1] >= 256
        is_stopped = sequence.stop_reason == "stop"
        assert is_stopped == (has_end or text.endswith(tuple(stop)))
        assert not any(word in text[:-1] for word in stop)


def test_one_stop_string_need_not_be_a_list(base: tinker.SamplingClient) -> None:
    params = {"max_tokens": 100, "seed": 5}

    [one] = _ask(base, params=types.SamplingParams(stop="e", **params)).sequences
    [listed] = _ask(base, params=types.SamplingParams(stop=["e"], **params)).sequences

    assert one.tokens == listed.tokens


def test_a_stop_token_ends_its_sequence_and_stays_in_it(base: tinker.SamplingClient) -> None:
    [free] = _ask(base, params=GREEDY).sequences
    last = free.tokens[4]

    params = GREEDY.model_copy(update={"stop": [last, 5]})
    [stopped] = _ask(base, params=params).sequences

    assert stopped.stop_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(last) + 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"topk_prompt_logprobs": 260}, "topk_prompt_logprobs is 260"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs is -1"),
        ({"prompt_alt_tokens_k": 2000}, "prompt_alt_tokens_k is 2000"),
        (
            {"include_prompt_logprobs": True, "prompt_logprobs_last_n": SIZE},
            f"prompt_logprobs_last_n is {SIZE}",
        ),
        (
            {"target_prompt_logprobs": types.TensorData([1, 2], "int64", [2, 1])},
            r"target_prompt_logprobs has the shape \[2, 1\]",
        ),
        (
            {
                "target_prompt_logprobs": types.TensorData(
                    [999] * (SIZE - 1), "int64", [SIZE - 1, 1]
                )
            },
            "target_prompt_logprobs holds token id 999",
        ),
    ],
)
def test_an_option_out_of_range_is_the_users_error_and_named(
    base: tinker.SamplingClient, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(tinker.RequestFailedError, match=said) as failed:
        _ask(base, **options)

    assert failed.value.category == types.RequestErrorCategory.User


def test_stability_info_is_refused_with_a_sentence(service_client: tinker.ServiceClient) -> None:
    client = service_client.create_sampling_client(base_model=TINY, record_stability_info=True)

    with pytest.raises(tinker.RequestFailedError, match="only stable_reinforce uses it") as failed:
        _ask(client.result(BOUND_S))

    assert failed.value.category == types.RequestErrorCategory.User


def test_sixteen_clients_at_once_get_what_each_gets_alone(
    service_client: tinker.ServiceClient, tiny_server: LocalServer
) -> None:
    prompts = [types.ModelInput.from_ints(tokens_of(TEXT[: number + 3])) for number in range(16)]
    clients = [
        service_client.create_sampling_client(base_model=TINY).result(BOUND_S) for _ in range(16)
    ]

    alone = [
        client.sample(prompt, 2, GREEDY).result(BOUND_S).sequences
        for client, prompt in zip(clients, prompts, strict=True)
    ]
    asked = [
        client.sample(prompt, 2, GREEDY) for client, prompt in zip(clients, prompts, strict=True)
    ]

    for future, sequences in zip(asked, alone, strict=True):
        together = future.result(BOUND_S).sequences
        assert [one.tokens for one in together] == [one.tokens for one in sequences]
        for one, other in zip(together, sequences, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_cancelled_sample_stops_and_leaves_the_others_alone(
    base: tinker.SamplingClient, tiny_server: LocalServer
) -> None:
    # 64 x 4,000 tokens would take the engine minutes.
    endless = base.sample(PROMPT, 64, types.SamplingParams(max_tokens=4000, stop=[]))
    _wait_until(lambda: _active(tiny_server) == 1)

    beside = base.sample(PROMPT, 1, GREEDY).result(BOUND_S)
    assert _active(tiny_server) == 1
    assert endless.future().cancel()

    _wait_until(lambda: _active(tiny_server) == 0)
    assert beside.sequences[0].tokens == _ask(base, params=GREEDY).sequences[0].tokens
