"""The losses through the real SDK: values, shapes, encodings, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from numpy.typing import NDArray
from tinker import types

from tiny_data import TINY, sdk_datum, tokens_of

BOUND_S = 30.0
FAST = types.AdamParams(learning_rate=1e-2)
TEXTS = ("the cat sat", "dogs run")

Array = NDArray[Any]


@pytest.fixture
def client(service_client: tinker.ServiceClient) -> tinker.TrainingClient:
    return _client(service_client)


def _client(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(TINY, rank=4, seed=0).result(BOUND_S)


def _logprobs(output: types.ForwardBackwardOutput) -> list[Array]:
    return [datum["logprobs"].to_numpy() for datum in output.loss_fn_outputs]


def _scores(client: tinker.TrainingClient, *texts: str) -> list[Array]:
    """Log-probabilities under the client's present weights; leaves no gradient."""
    data = [sdk_datum(text) for text in texts or TEXTS]
    return _logprobs(client.forward(data, "cross_entropy").result(BOUND_S))


def _datum(text: str, **inputs: Any) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens_of(text)[:-1]), loss_fn_inputs=inputs
    )


def _several_targets(text: str, width: int) -> tuple[Array, Array]:
    """Targets (N, K) and weights (N, K) that spell `text` in the first of K columns."""
    rng = np.random.default_rng(width)
    targets = rng.integers(1, 256, (len(text) - 1, width))
    targets[:, 0] = tokens_of(text)[1:]
    return targets, rng.random(targets.shape).astype(np.float32)


def _importance_sampling(lp: Array, q: Array, a: Array, m: Array) -> float:
    return -float((np.exp(lp - q) * a).sum())


def _ppo(lp: Array, q: Array, a: Array, m: Array) -> float:
    r = np.exp(lp - q)
    return -float(np.minimum(r * a, np.clip(r, 0.9, 1.3) * a).sum())


def _cispo(lp: Array, q: Array, a: Array, m: Array) -> float:
    return -float((np.clip(np.exp(lp - q), 0.0, 4.0) * a * lp).sum())  # the defaults


def _dro(lp: Array, q: Array, a: Array, m: Array) -> float:
    return -float((lp * a - 0.025 * (lp - q) ** 2).sum())


def _gspo(lp: Array, q: Array, a: Array, m: Array) -> float:
    s = math.exp(((lp - q) * m).sum() / m.sum())
    return -float(np.minimum(s * a, np.clip(s, 0.95, 1.05) * a).sum())


FORMULAS: Mapping[str, tuple[Mapping[str, float] | None, Callable[..., float]]] = {
    "importance_sampling": (None, _importance_sampling),
    "ppo": ({"clip_low_threshold": 0.9, "clip_high_threshold": 1.3}, _ppo),
    "cispo": (None, _cispo),
    "dro": ({"beta": 0.05}, _dro),
    "gspo": ({"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}, _gspo),
}


def _on_samples(
    client: tinker.TrainingClient, noise: float
) -> tuple[list[types.Datum], list[tuple[Array, Array, Array]]]:
    """Datums for every loss on samples, and (q, A, mask) of each; lp - q spreads by `noise`."""
    rng = np.random.default_rng(0)
    data, inputs = [], []
    for text, lp in zip(TEXTS, _scores(client), strict=True):
        q = (lp + rng.normal(0, noise, len(lp))).astype(np.float32)
        a = rng.normal(0, 1, len(lp)).astype(np.float32)
        mask = (np.arange(len(lp)) >= 2).astype(np.float32)
        inputs.append((q, a, mask))
        data.append(
            _datum(
                text,
                target_tokens=tokens_of(text)[1:],
                logprobs=q,
                advantages=a,
                sequence_ratio_mask=mask,
                weights=mask,  # as in Tinker's examples, which no loss on samples reads
            )
        )
    return data, inputs


@pytest.mark.parametrize("loss_fn", FORMULAS)
def test_the_reported_loss_is_the_formula_of_the_returned_logprobs(
    client: tinker.TrainingClient, loss_fn: Any
) -> None:
    config, formula = FORMULAS[loss_fn]
    data, inputs = _on_samples(client, noise=0.5)

    output = client.forward_backward(data, loss_fn, config).result(BOUND_S)

    expected = sum(formula(lp, *rest) for lp, rest in zip(_logprobs(output), inputs, strict=True))
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_fn", FORMULAS)
def test_a_forward_gives_the_same_loss_and_leaves_no_gradient(
    client: tinker.TrainingClient, loss_fn: Any
) -> None:
    config, _ = FORMULAS[loss_fn]
    data, _ = _on_samples(client, noise=0.5)

    scored = client.forward(data, loss_fn, config).result(BOUND_S)

    with pytest.raises(tinker.RequestFailedError, match="no gradient to apply"):
        client.optim_step(FAST).result(BOUND_S)
    trained = client.forward_backward(data, loss_fn, config).result(BOUND_S)
    assert scored.metrics == trained.metrics


@pytest.mark.parametrize("loss_fn", FORMULAS)
def test_on_the_samplers_own_policy_a_step_is_that_of_cross_entropy_weighted_by_advantage(
    service_client: tinker.ServiceClient, loss_fn: Any
) -> None:
    on_samples, supervised = _client(service_client), _client(service_client)
    config, _ = FORMULAS[loss_fn]
    data, inputs = _on_samples(on_samples, noise=0.0)
    weighted = [
        sdk_datum(text, advantages.tolist())
        for text, (_, advantages, _) in zip(TEXTS, inputs, strict=True)
    ]

    on_samples.forward_backward(data, loss_fn, config)
    supervised.forward_backward(weighted, "cross_entropy")

    for trained in (on_samples, supervised):
        trained.optim_step(FAST).result(BOUND_S)
    for one, other in zip(_scores(on_samples), _scores(supervised), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_clipped_tokens_add_up_over_chunks(
    client: tinker.TrainingClient,
    service_client: tinker.ServiceClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, inputs = _on_samples(client, noise=0.5)
    config, _ = FORMULAS["ppo"]
    changed = service_client.holder.get_client_config().model_copy(
        update={"fwdbwd_max_chunk_len": 1}
    )
    monkeypatch.setattr(service_client.holder, "_client_config", changed)

    output = client.forward(data, "ppo", config).result(BOUND_S)

    ratios = [np.exp(lp - q) for lp, (q, _, _) in zip(_logprobs(output), inputs, strict=True)]
    outside = [int(((r < 0.9) | (r > 1.3)).sum()) for r in ratios]
    assert min(outside) > 0
    assert output.metrics["clipped_tokens:sum"] == sum(outside)


def test_a_loss_that_overflows_is_refused_and_the_adapter_stays_finite(
    client: tinker.TrainingClient,
) -> None:
    before = _scores(client)
    inputs = {"logprobs": [-1000.0] * 4, "advantages": [1.0] * 4}
    bad = _datum("a cat", target_tokens=tokens_of(" cat"), **inputs)

    with pytest.raises(tinker.RequestFailedError, match=r"of data\[0\] is -inf"):
        client.forward_backward([bad], "importance_sampling").result(BOUND_S)

    np.testing.assert_array_equal(_scores(client)[0], before[0])


def test_one_target_in_a_column_of_its_own_is_the_same_as_one_target(
    service_client: tinker.ServiceClient,
) -> None:
    flat, column = _client(service_client), _client(service_client)
    weights = np.linspace(-1, 1, len("the cat sat") - 1, dtype=np.float32)
    targets = np.array(tokens_of("the cat sat")[1:])

    flat_output = flat.forward_backward(
        [_datum("the cat sat", target_tokens=targets, weights=weights)], "cross_entropy"
    ).result(BOUND_S)
    column_output = column.forward_backward(
        [_datum("the cat sat", target_tokens=targets[:, None], weights=weights[:, None])],
        "cross_entropy",
    ).result(BOUND_S)

    np.testing.assert_allclose(_logprobs(column_output)[0][:, 0], _logprobs(flat_output)[0])
    assert column_output.metrics == pytest.approx(flat_output.metrics, rel=1e-6)
    steps = [client.optim_step(FAST).result(BOUND_S).metrics for client in (flat, column)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)


def test_datums_of_different_shapes_share_a_request_and_keep_their_order(
    client: tinker.TrainingClient,
) -> None:
    texts = ("the cat", "dogs run away", "on the mat", "it is", "a dog")
    widths = (0, 3, 2, 2, 0)  # 0: one target a position
    data = []
    for text, width in zip(texts, widths, strict=True):
        targets, weights = _several_targets(text, width or 1)
        shape = (len(text) - 1, width) if width else (len(text) - 1,)
        data.append(
            _datum(text, target_tokens=targets.reshape(shape), weights=weights.reshape(shape))
        )

    together = _logprobs(client.forward(data, "cross_entropy").result(BOUND_S))

    assert [lp.shape for lp in together] == [(6,), (12, 3), (9, 2), (4, 2), (4,)]
    for lp, plain, width in zip(together, _scores(client, *texts), widths, strict=True):
        np.testing.assert_allclose(lp[:, 0] if width else lp, plain, atol=1e-5)


def test_a_soft_label_trains_as_one_datum_for_each_of_its_targets(
    service_client: tinker.ServiceClient,
) -> None:
    soft, single = _client(service_client), _client(service_client)
    targets, weights = _several_targets("the cat sat", 3)
    other = sdk_datum("dogs run")  # of another shape, in the same forward pass
    columns = [
        _datum("the cat sat", target_tokens=targets[:, k].copy(), weights=weights[:, k].copy())
        for k in range(3)
    ]

    together = soft.forward_backward(
        [_datum("the cat sat", target_tokens=targets, weights=weights), other], "cross_entropy"
    ).result(BOUND_S)
    apart = single.forward_backward([*columns, other], "cross_entropy").result(BOUND_S)

    assert together.metrics["loss:sum"] == pytest.approx(apart.metrics["loss:sum"], rel=1e-6)
    expected = np.stack(_logprobs(apart)[:3], axis=1)
    np.testing.assert_allclose(_logprobs(together)[0], expected, atol=1e-5)
    steps = [client.optim_step(FAST).result(BOUND_S).metrics for client in (soft, single)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)


def test_sparse_targets_and_weights_train_as_dense_ones_do(
    service_client: tinker.ServiceClient,
) -> None:
    dense_client, sparse_client = _client(service_client), _client(service_client)
    targets, weights = _several_targets("the cat sat", 4)
    targets[:7], weights[:7] = 0, 0.0  # the prompt
    dense = _datum("the cat sat", target_tokens=targets, weights=weights)
    sparse = _datum(
        "the cat sat",
        target_tokens=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
    )
    assert dense.loss_fn_inputs["weights"].sparse_crow_indices is None
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    assert sparse.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None

    outputs = [
        client.forward_backward([datum], "cross_entropy").result(BOUND_S)
        for client, datum in ((dense_client, dense), (sparse_client, sparse))
    ]

    np.testing.assert_array_equal(_logprobs(outputs[0])[0], _logprobs(outputs[1])[0])
    assert outputs[0].metrics == outputs[1].metrics
    for client in (dense_client, sparse_client):
        client.optim_step(FAST).result(BOUND_S)
    np.testing.assert_array_equal(_scores(dense_client)[0], _scores(sparse_client)[0])


def _sparse_weights(columns: Sequence[int]) -> types.Datum:
    weights = types.TensorData(
        data=[1.0, 1.0],
        dtype="float32",
        shape=[2, 2],
        sparse_crow_indices=[0, 2, 2],
        sparse_col_indices=list(columns),
    )
    return _datum("abc", target_tokens=np.ones((2, 2), np.int64), weights=weights)


def _with_spans() -> types.Datum:
    spans: Any = [types.SampledProvenanceSpan(sequence_id="s", length=2)]
    return sdk_datum("abc").with_provenance(spans, spans)


def _of_chunk(chunk: Any) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput(chunks=[chunk]), loss_fn_inputs={"target_tokens": [98]}
    )


REFUSED: Mapping[str, tuple[Callable[[], types.Datum], str]] = {
    "a column named twice": (
        lambda: _sparse_weights([1, 1]),
        r"data\[1\].loss_fn_inputs\['weights'\] names a column twice",
    ),
    "provenance spans": (_with_spans, r"data\[1\] carries provenance spans.*keeps no record"),
    "an image": (
        lambda: _of_chunk(types.ImageChunk(data=b"png", format="png", expected_tokens=1)),
        r"data\[1\] holds an image; .* read text only",
    ),
    "audio": (  # a serialised tensor of the shape (1,)
        lambda: _of_chunk(types.DmelChunk(dmel=bytes([0, 1, 1]))),
        r"data\[1\] holds audio \(dmel\); .* read text only",
    ),
    "targets outside the vocabulary": (
        lambda: _datum("abc", target_tokens=np.array([[1, 2], [3, 300]])),
        r"data\[1\].target_tokens holds token id 300",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_datum_that_cannot_be_trained_on_fails_as_the_users_and_the_next_one_is_served(
    client: tinker.TrainingClient, case: str
) -> None:
    make, said = REFUSED[case]

    with pytest.raises(tinker.RequestFailedError, match=said) as failed:
        client.forward_backward([sdk_datum("abc"), make()], "cross_entropy").result(BOUND_S)

    assert failed.value.category == types.RequestErrorCategory.User
    assert len(_scores(client)) == 2


@pytest.mark.parametrize(
    ("loss_fn", "config", "said"),
    [
        ("dro", None, r"dro needs loss_fn_config \['beta'\]: Tinker does not document"),
        ("gspo", {"clip_low_threshold": 0.9}, r"gspo needs .*\['clip_high_threshold'\]"),
        ("ppo", {"clip_low_threshold": "0.8"}, r"'clip_low_threshold'\] is '0.8', no number"),
        ("ppo", {"epsilon": 0.2}, r"no loss_fn_config \['epsilon'\]"),
        ("stable_reinforce", {"kl_coeff": 0.1}, "publishes no formula"),
        ("custom", {"loss_id": "any"}, "Call forward_backward_custom"),
    ],
)
def test_a_loss_or_config_that_is_not_served_says_why(
    client: tinker.TrainingClient, loss_fn: Any, config: Any, said: str
) -> None:
    data, _ = _on_samples(client, noise=0.1)

    with pytest.raises(tinker.RequestFailedError, match=said) as failed:
        client.forward_backward(data, loss_fn, config).result(BOUND_S)

    assert failed.value.category == types.RequestErrorCategory.User
