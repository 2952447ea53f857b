"""Sampling with the real SDK over loopback."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tiny_data import TINY, sdk_datum, tokens_of

BOUND_S = 30.0
TEXT = "the cat sat on the mat"
PROMPT = types.ModelInput.from_ints(tokens_of(TEXT))

_names = (f"sampler-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def trained(service_client: tinker.ServiceClient) -> tinker.TrainingClient:
    """A client a few steps into training."""
    client = service_client.create_lora_training_client(TINY, rank=4, seed=0).result(BOUND_S)
    _train(client, 8)
    return client


@pytest.fixture(scope="module")
def base(service_client: tinker.ServiceClient) -> tinker.SamplingClient:
    return service_client.create_sampling_client(base_model=TINY).result(BOUND_S)


@pytest.fixture(params=["ephemeral", "named"])
def sampler(
    request: pytest.FixtureRequest,
    service_client: tinker.ServiceClient,
    trained: tinker.TrainingClient,
) -> Iterator[tinker.SamplingClient]:
    """A sampling client on `trained` as it is now, by either way the SDK has."""
    if request.param == "ephemeral":
        yield trained.save_weights_and_get_sampling_client().result(BOUND_S)
    else:
        path = trained.save_weights_for_sampler(next(_names)).result(BOUND_S).path
        yield service_client.create_sampling_client(model_path=path).result(BOUND_S)


def _train(client: tinker.TrainingClient, steps: int) -> None:
    for _ in range(steps):
        client.forward_backward([sdk_datum(TEXT)], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result(BOUND_S)


def _sample(
    client: tinker.SamplingClient, num_samples: int = 1, **params: Any
) -> list[types.SampledSequence]:
    chosen = types.SamplingParams(**{"max_tokens": 12, "seed": 1, "stop": [], **params})
    return list(client.sample(PROMPT, num_samples, chosen).result(BOUND_S).sequences)


def _forward(client: tinker.TrainingClient, tokens: list[int]) -> np.ndarray:
    """log p of each token after the first."""
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    output = client.forward([datum], "cross_entropy").result(BOUND_S)
    return np.array(output.loss_fn_outputs[0]["logprobs"].data)


def test_sampler_logprobs_equal_forward_logprobs(
    sampler: tinker.SamplingClient, trained: tinker.TrainingClient
) -> None:
    for drawn in _sample(sampler, num_samples=3):
        forward = _forward(trained, [*tokens_of(TEXT), *drawn.tokens])
        np.testing.assert_allclose(drawn.logprobs, forward[len(TEXT) - 1 :], atol=1e-4)


def test_compute_logprobs_equals_forward_logprobs(
    sampler: tinker.SamplingClient, trained: tinker.TrainingClient
) -> None:
    scored = sampler.compute_logprobs(PROMPT).result(BOUND_S)

    assert scored[0] is None
    np.testing.assert_allclose(
        np.array(scored[1:], dtype=float), _forward(trained, tokens_of(TEXT)), atol=1e-4
    )


def test_a_sampling_client_keeps_its_weights_as_training_goes_on(
    sampler: tinker.SamplingClient, trained: tinker.TrainingClient
) -> None:
    before = sampler.compute_logprobs(PROMPT).result(BOUND_S)

    _train(trained, 2)

    assert sampler.compute_logprobs(PROMPT).result(BOUND_S) == before
    fresh = trained.save_weights_and_get_sampling_client().result(BOUND_S)
    assert fresh.compute_logprobs(PROMPT).result(BOUND_S) != before


def test_training_raises_the_likelihood_of_its_text(
    sampler: tinker.SamplingClient, base: tinker.SamplingClient
) -> None:
    trained_sum, base_sum = (
        sum(score for score in client.compute_logprobs(PROMPT).result(BOUND_S) if score is not None)
        for client in (sampler, base)
    )

    assert trained_sum > base_sum / 2


def test_the_sdk_is_told_why_a_sequence_ended(base: tinker.SamplingClient) -> None:
    [free] = _sample(base)
    [stopped] = _sample(base, stop=[free.tokens[3]])

    assert (free.stop_reason, len(free.tokens)) == ("length", 12)
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]


def test_the_same_seed_gives_the_same_samples(base: tinker.SamplingClient) -> None:
    first, second = (_sample(base, num_samples=4) for _ in range(2))

    assert [sequence.tokens for sequence in first] == [sequence.tokens for sequence in second]


def test_many_requests_at_once_are_all_answered(base: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=2)
    asked = [base.sample(PROMPT, 2, params) for _ in range(40)]

    assert [len(future.result(BOUND_S).sequences) for future in asked] == [2] * 40


@pytest.mark.parametrize(
    ("params", "said"),
    [({"temperature": -1.0}, "temperature -1.0"), ({"top_p": 2.0}, "top_p 2.0")],
)
def test_an_argument_out_of_range_is_named(
    base: tinker.SamplingClient, params: dict[str, Any], said: str
) -> None:
    with pytest.raises(tinker.RequestFailedError, match=said):
        _sample(base, **params)


def test_a_prompt_with_an_image_is_refused(base: tinker.SamplingClient) -> None:
    image = types.ModelInput(
        chunks=[types.ImageChunk(data=b"png", format="png", expected_tokens=1)]
    )

    with pytest.raises(tinker.RequestFailedError, match=r"holds an image; .* read text only"):
        base.sample(image, 1, types.SamplingParams(max_tokens=1)).result(BOUND_S)


def test_the_samplers_base_model_is_known(sampler: tinker.SamplingClient) -> None:
    assert sampler.get_base_model() == TINY


@pytest.mark.parametrize(
    "path", ["tinker://lost/sampler_weights/x", "nonsense", "tinker://a/b/c/d"]
)
def test_sampling_from_unknown_weights_is_refused(
    service_client: tinker.ServiceClient, path: str
) -> None:
    with pytest.raises((tinker.TinkerError, ValueError)):
        service_client.create_sampling_client(model_path=path).result(BOUND_S)
