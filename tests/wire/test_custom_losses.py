"""Custom losses: computed in the client's process from log-probabilities of the server's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tiny_data import TINY, sdk_datum, tokens_of

BOUND_S = 30.0
FAST = types.AdamParams(learning_rate=1e-2)
TEXTS = ("the cat sat", "dogs run", "a mat", "far away from here", "it is")

Logprobs = list[torch.Tensor]


def _client(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(TINY, rank=4, seed=0).result(BOUND_S)


def _data() -> list[types.Datum]:
    """One datum a text, its weights rising from -0.5 to 1."""
    return [
        sdk_datum(text, np.linspace(-0.5, 1, len(text) - 1, dtype=np.float32).tolist())
        for text in TEXTS
    ]


def _soft_data() -> list[types.Datum]:
    """The same texts with three targets a position."""
    rng = np.random.default_rng(0)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens_of(text)[:-1]),
            loss_fn_inputs={
                "target_tokens": rng.integers(1, 256, (len(text) - 1, 3)),
                "weights": rng.random((len(text) - 1, 3)).astype(np.float32),
            },
        )
        for text in TEXTS
    ]


def _cross_entropy(data: list[types.Datum], logprobs: Logprobs) -> Any:
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    loss = -sum((w * lp).sum() for w, lp in zip(weights, logprobs, strict=True))
    return loss, {"datums": float(len(data))}


def _traced_cross_entropy(logprobs: torch.Tensor, weights: torch.Tensor) -> Any:
    loss = -(weights * logprobs).sum()
    return loss, {"custom/own:sum": loss, "custom/own:mean": loss}


def _scores(client: tinker.TrainingClient) -> np.ndarray:
    output = client.forward(_data(), "cross_entropy").result(BOUND_S)
    return np.concatenate([datum["logprobs"].to_numpy() for datum in output.loss_fn_outputs])


def _chunks_of_two(service: tinker.ServiceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    config = service.holder.get_client_config().model_copy(update={"fwdbwd_max_chunk_len": 2})
    monkeypatch.setattr(service.holder, "_client_config", config)


@pytest.fixture(scope="module")
def handles(service_client: tinker.ServiceClient) -> Mapping[int, tinker.LossHandle]:
    """By rank; the SDK lets a session create each loss once."""
    ranks: tuple[Literal[1, 2], ...] = (1, 2)
    return {
        rank: service_client.create_custom_loss(
            _traced_cross_entropy, {"logprobs": rank, "weights": rank}
        ).result(BOUND_S)
        for rank in ranks
    }


@pytest.mark.parametrize("kind", ["callable", "handle"])
@pytest.mark.parametrize("chunks", ["one request", "several requests"])
@pytest.mark.parametrize(("make", "rank"), [(_data, 1), (_soft_data, 2)], ids=["(N,)", "(N,K)"])
def test_a_custom_cross_entropy_trains_exactly_as_the_built_in_one(
    service_client: tinker.ServiceClient,
    handles: Mapping[int, tinker.LossHandle],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    chunks: str,
    make: Callable[[], list[types.Datum]],
    rank: int,
) -> None:
    built_in, custom = _client(service_client), _client(service_client)
    loss_fn: Any = _cross_entropy if kind == "callable" else handles[rank]
    if chunks == "several requests":
        _chunks_of_two(service_client, monkeypatch)  # 3 forward and 3 backward

    expected = built_in.forward_backward(make(), "cross_entropy")
    output = custom.forward_backward_custom(make(), loss_fn)
    steps = [client.optim_step(FAST) for client in (built_in, custom)]  # before the results

    metrics = output.result(BOUND_S).metrics
    assert metrics["loss:sum"] == pytest.approx(expected.result(BOUND_S).metrics["loss:sum"])
    assert metrics["surrogate_loss:sum"] == pytest.approx(metrics["loss:sum"])
    assert len(output.result(BOUND_S).loss_fn_outputs) == len(TEXTS)
    norms = [step.result(BOUND_S).metrics for step in steps]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    np.testing.assert_array_equal(_scores(custom), _scores(built_in))


def test_the_metrics_of_a_handle_combine_over_datums_by_their_suffix(
    service_client: tinker.ServiceClient,
    handles: Mapping[int, tinker.LossHandle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _chunks_of_two(service_client, monkeypatch)

    future = _client(service_client).forward_backward_custom(_data(), handles[1])

    metrics = future.result(BOUND_S).metrics
    assert handles[1].loss_id is None  # it is not uploaded: the client computes it
    assert metrics["custom/own:sum"] == pytest.approx(metrics["loss:sum"])
    assert metrics["custom/own:mean"] == pytest.approx(metrics["loss:sum"] / len(TEXTS))


def test_a_custom_loss_may_couple_datums(service_client: tinker.ServiceClient) -> None:
    """A preference between two datums: -log sigmoid of the difference of their sums."""
    client = _client(service_client)
    pair = [sdk_datum("yes please"), sdk_datum("no thanks")]

    def preference(data: list[types.Datum], logprobs: Logprobs) -> Any:
        margin = logprobs[0].sum() - logprobs[1].sum()
        return -torch.nn.functional.logsigmoid(margin), {"margin": margin.item()}

    margins = []
    for _ in range(4):
        future = client.forward_backward_custom(pair, preference)
        client.optim_step(FAST)
        margins.append(future.result(BOUND_S).metrics["margin"])

    assert margins == sorted(margins)
    assert margins[-1] > margins[0] + 1


def test_a_custom_ppo_trains_as_the_built_in_one(service_client: tinker.ServiceClient) -> None:
    built_in, custom = _client(service_client), _client(service_client)
    rng = np.random.default_rng(1)
    shift = rng.normal(0, 0.5, len(_scores(built_in))).astype(np.float32)
    q = np.split(_scores(built_in) + shift, np.cumsum([len(text) - 1 for text in TEXTS])[:-1])
    data = [
        types.Datum(
            model_input=datum.model_input,
            loss_fn_inputs={
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "logprobs": logprobs,
                "advantages": datum.loss_fn_inputs["weights"],
            },
        )
        for datum, logprobs in zip(_data(), q, strict=True)
    ]

    def ppo(data: list[types.Datum], logprobs: Logprobs) -> Any:
        loss = torch.zeros(())
        for datum, lp in zip(data, logprobs, strict=True):
            inputs = {name: value.to_torch() for name, value in datum.loss_fn_inputs.items()}
            r, a = (lp - inputs["logprobs"]).exp(), inputs["advantages"]
            loss = loss - torch.minimum(r * a, r.clamp(0.8, 1.2) * a).sum()
        return loss, {}

    expected = built_in.forward_backward(data, "ppo").result(BOUND_S)
    output = custom.forward_backward_custom(data, ppo).result(BOUND_S)

    assert output.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
    for client in (built_in, custom):
        client.optim_step(FAST).result(BOUND_S)
    np.testing.assert_allclose(_scores(custom), _scores(built_in), atol=1e-4)


def test_a_loss_that_is_uploaded_is_refused_with_the_way_that_works(
    service_client: tinker.ServiceClient, handles: Mapping[int, tinker.LossHandle]
) -> None:
    client = _client(service_client)
    uploaded = dataclasses.replace(handles[1], loss_id="loss-1")

    with pytest.raises(tinker.RequestFailedError, match="Call forward_backward_custom"):
        client.forward_backward_custom(_data(), uploaded).result(BOUND_S)
