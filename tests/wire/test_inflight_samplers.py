"""Sampling clients whose weights follow the training, with the real SDK."""

from __future__ import annotations

import tinker
from tinker import types

from servers import LocalServer
from tiny_data import TINY, sdk_datum, tokens_of

BOUND_S = 30.0
TEXT = "the cat sat"


def _train(client: tinker.TrainingClient) -> None:
    client.forward_backward([sdk_datum(TEXT)], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result(BOUND_S)


def _sampler(
    client: tinker.TrainingClient, kind: types.SamplingClientKind
) -> tinker.SamplingClient:
    return client.save_weights_and_get_sampling_client(kind=kind).result(BOUND_S)


def _logprobs(sampler: tinker.SamplingClient) -> list[float | None]:
    return sampler.compute_logprobs(types.ModelInput.from_ints(tokens_of(TEXT))).result(BOUND_S)


def test_a_save_renews_the_weights_of_all_inflight_samplers_of_its_client(
    service_client: tinker.ServiceClient,
) -> None:
    client, other = (
        service_client.create_lora_training_client(TINY, rank=2, seed=seed).result(BOUND_S)
        for seed in (0, 1)
    )
    _train(client)
    _train(other)
    first, snapshot, of_other = (
        _sampler(client, "inflight"),
        _sampler(client, "snapshot"),
        _sampler(other, "inflight"),
    )
    before, before_of_other = _logprobs(first), _logprobs(of_other)
    assert _logprobs(snapshot) == before

    _train(client)
    assert _logprobs(first) == before
    second = _sampler(client, "inflight")

    after = _logprobs(second)
    assert after != before
    assert _logprobs(first) == after
    assert _logprobs(_sampler(client, "snapshot")) == after
    assert _logprobs(snapshot) == before
    assert _logprobs(of_other) == before_of_other


def test_inflight_samplers_of_a_client_share_one_folder_that_goes_with_their_session(
    own_server: LocalServer,
) -> None:
    def folders() -> int:
        return len(list((own_server.state_dir / "ephemeral").iterdir()))

    def service() -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=own_server.base_url, api_key=own_server.api_key)

    with service() as first:
        client = first.create_lora_training_client(TINY, rank=2).result(BOUND_S)
        for _ in range(3):
            _sampler(client, "inflight")
        assert folders() == 1

    with service() as second:  # its client is made behind the end of the other session
        second.create_lora_training_client(TINY, rank=2).result(BOUND_S)
        assert folders() == 0
