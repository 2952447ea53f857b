"""Training with the real SDK over loopback."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tiny_data import TINY, sdk_datum

BOUND_S = 30.0
FAST = types.AdamParams(learning_rate=1e-2)
TEXT = "the cat sat on the mat"
OTHER = "all dogs run far away"


def _client(service: tinker.ServiceClient, **options: Any) -> tinker.TrainingClient:
    return service.create_lora_training_client(TINY, **{"rank": 4, "seed": 0, **options}).result(
        BOUND_S
    )


def _losses(
    client: tinker.TrainingClient, steps: int, *texts: str, params: types.AdamParams = FAST
) -> list[float]:
    """The loss before each of so many steps; all requests are in flight at once."""
    data = [sdk_datum(text) for text in texts or (TEXT,)]
    done = []
    for _ in range(steps):
        done.append(client.forward_backward(data, "cross_entropy"))
        client.optim_step(params)
    return [future.result(BOUND_S).metrics["loss:sum"] for future in done]


def _logprobs(output: types.ForwardBackwardOutput, position: int = 0) -> np.ndarray:
    return np.array(output.loss_fn_outputs[position]["logprobs"].data)


def test_a_tiny_set_is_overfit_below_a_tenth_of_its_loss(
    service_client: tinker.ServiceClient,
) -> None:
    steady = types.AdamParams(learning_rate=3e-3)

    losses = _losses(_client(service_client, rank=16), 60, TEXT, OTHER, params=steady)

    assert losses[-1] < losses[0] / 10


def test_four_steps_equal_two_saved_loaded_and_two_more(
    service_client: tinker.ServiceClient,
) -> None:
    uninterrupted = _losses(_client(service_client), 4)
    client = _client(service_client)
    losses = _losses(client, 2)

    state = client.save_state("two").result(BOUND_S)
    resumed = service_client.create_training_client_from_state_with_optimizer(state.path)

    assert losses + _losses(resumed.result(BOUND_S), 2) == uninterrupted


def test_a_state_loaded_without_its_optimizer_starts_adam_anew(
    service_client: tinker.ServiceClient,
) -> None:
    client = _client(service_client)
    _losses(client, 3)
    state = client.save_state("three").result(BOUND_S)

    reset = service_client.create_training_client_from_state(state.path).result(BOUND_S)

    kept_losses, reset_losses = _losses(client, 2), _losses(reset, 2)
    assert kept_losses[0] == reset_losses[0]
    assert kept_losses[1] != reset_losses[1]


def test_rank_and_chosen_modules_survive_a_save(
    service_client: tinker.ServiceClient, rest_client: tinker.RestClient
) -> None:
    client = _client(service_client, rank=3, train_mlp=False, train_unembed=False)
    path = client.save_state("flags").result(BOUND_S).path
    resumed = service_client.create_training_client_from_state(path).result(BOUND_S)
    again = resumed.save_state("again").result(BOUND_S).path

    assert resumed.get_info().lora_rank == 3
    for saved in (path, again):
        info = rest_client.get_weights_info_by_tinker_path(saved).result(BOUND_S)
        flags = (info.lora_rank, info.train_attn, info.train_mlp, info.train_unembed)
        assert flags == (3, True, False, False)


def test_the_same_seed_gives_the_same_training(service_client: tinker.ServiceClient) -> None:
    first, second, other = (_losses(_client(service_client, seed=s), 3) for s in (5, 5, 6))

    assert first == second
    assert first != other


def test_get_info_names_the_model_and_its_tokenizers_folder(
    service_client: tinker.ServiceClient,
) -> None:
    info = _client(service_client, rank=7).get_info()

    assert (info.model_data.model_name, info.lora_rank, info.is_lora) == (TINY, 7, True)
    assert info.model_id.split(":")[1] == "train"


def test_chunks_that_arrive_in_any_order_give_what_one_request_gives(
    service_client: tinker.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [TEXT[: 3 + n % 9] for n in range(20)]
    data = [sdk_datum(text) for text in texts]
    client, chunked = _client(service_client), _client(service_client)
    whole = client.forward_backward(data, "cross_entropy").result(BOUND_S)
    step = client.optim_step(FAST).result(BOUND_S)

    config = service_client.holder.get_client_config()
    config = config.model_copy(update={"fwdbwd_max_chunk_len": 3})  # 7 requests
    monkeypatch.setattr(service_client.holder, "_client_config", config)
    parts = chunked.forward_backward(data, "cross_entropy").result(BOUND_S)
    chunked_step = chunked.optim_step(FAST).result(BOUND_S)

    assert parts.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-6)
    for position in range(20):
        np.testing.assert_allclose(
            _logprobs(parts, position), _logprobs(whole, position), atol=1e-5
        )
    assert step.metrics is not None
    assert chunked_step.metrics == pytest.approx(step.metrics, rel=1e-5)


def test_a_forward_scores_without_leaving_a_gradient(service_client: tinker.ServiceClient) -> None:
    client = _client(service_client)

    client.forward([sdk_datum(TEXT)], "cross_entropy").result(BOUND_S)

    with pytest.raises(tinker.RequestFailedError, match="no gradient to apply"):
        client.optim_step(FAST).result(BOUND_S)


def test_gradients_of_two_calls_add_up(service_client: tinker.ServiceClient) -> None:
    together, apart = _client(service_client), _client(service_client)
    together.forward_backward([sdk_datum(TEXT), sdk_datum(OTHER)], "cross_entropy")
    apart.forward_backward([sdk_datum(TEXT)], "cross_entropy")
    apart.forward_backward([sdk_datum(OTHER)], "cross_entropy")

    steps = [client.optim_step(FAST).result(BOUND_S).metrics for client in (together, apart)]

    assert steps[0] == pytest.approx(steps[1], rel=1e-5)


def test_a_custom_loss_equals_cross_entropy(service_client: tinker.ServiceClient) -> None:
    built_in, custom = _client(service_client), _client(service_client)
    data = [sdk_datum(TEXT)]

    def negative_sum(_: Any, logprobs: list[Any]) -> Any:
        loss = -logprobs[0].sum()
        return loss, {"own": loss.item()}

    built_in.forward_backward(data, "cross_entropy")
    output = custom.forward_backward_custom(data, negative_sum).result(BOUND_S)

    expected = built_in.optim_step(FAST).result(BOUND_S).metrics
    assert custom.optim_step(FAST).result(BOUND_S).metrics == pytest.approx(expected, rel=1e-5)
    assert output.metrics["own"] > 0


BAD_DATA = {
    "a token outside the vocabulary": (
        lambda: types.Datum(
            model_input=types.ModelInput.from_ints([97, 300]),
            loss_fn_inputs={"target_tokens": [98, 99], "weights": [1.0, 1.0]},
        ),
        "token id 300",
    ),
    "a missing input": (
        lambda: types.Datum(
            model_input=types.ModelInput.from_ints([97]), loss_fn_inputs={"weights": [1.0]}
        ),
        "lacks loss_fn_inputs['target_tokens']",
    ),
    "an unshifted datum": (
        lambda: types.Datum(
            model_input=types.ModelInput.from_ints([97, 98]),
            loss_fn_inputs={"target_tokens": [98], "weights": [1.0]},
        ),
        "targets tokens[1:]",
    ),
    "an image": (
        lambda: types.Datum(
            model_input=types.ModelInput(
                chunks=[types.ImageChunk(data=b"png", format="png", expected_tokens=1)]
            ),
            loss_fn_inputs={"target_tokens": [98], "weights": [1.0]},
        ),
        "image",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_fails_its_future_and_the_step_that_waits_then_training_goes_on(
    service_client: tinker.ServiceClient, case: str
) -> None:
    make, said = BAD_DATA[case]
    client, undisturbed = _client(service_client), _client(service_client)

    good = client.forward_backward([sdk_datum(TEXT)], "cross_entropy")
    bad = client.forward_backward([sdk_datum(TEXT), make()], "cross_entropy")
    step = client.optim_step(FAST)
    losses = _losses(client, 2)

    good.result(BOUND_S)
    with pytest.raises(tinker.RequestFailedError) as failed:
        bad.result(BOUND_S)
    assert said in str(failed.value)
    with pytest.raises(tinker.RequestFailedError) as refused:
        step.result(BOUND_S)
    assert "No step was taken" in str(refused.value)
    assert said in str(refused.value)
    assert losses == _losses(undisturbed, 2)


@pytest.mark.parametrize("loss_fn", ["dro", "gspo", "stable_reinforce"])
def test_an_unserved_loss_is_named(service_client: tinker.ServiceClient, loss_fn: Any) -> None:
    client = _client(service_client)

    with pytest.raises(tinker.RequestFailedError, match=loss_fn):
        client.forward_backward([sdk_datum(TEXT)], loss_fn).result(BOUND_S)


def test_another_optimizer_is_refused_when_the_client_is_made(
    service_client: tinker.ServiceClient,
) -> None:
    with pytest.raises(tinker.BadRequestError, match="does not serve the optimizer 'dimuon'"):
        _client(service_client, optimizer=types.DimuonOptimizerConfig())


def test_another_optimizers_step_is_refused_and_uses_up_its_number(
    service_client: tinker.ServiceClient,
) -> None:
    client = _client(service_client)
    client.forward_backward([sdk_datum(TEXT)], "cross_entropy")

    with pytest.raises(tinker.RequestFailedError, match="dimuon"):
        client.optim_step(types.DimuonParams(learning_rate=1e-3)).result(BOUND_S)

    client.optim_step(FAST).result(BOUND_S)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (types.AdamParams(learning_rate=-1.0), "learning_rate is -1.0"),
        (types.AdamParams(learning_rate=1e-4, beta1=1.0), "beta1 is 1.0"),
    ],
)
def test_a_step_with_an_impossible_value_is_refused_and_training_goes_on(
    service_client: tinker.ServiceClient, params: types.AdamParams, said: str
) -> None:
    client = _client(service_client)
    client.forward_backward([sdk_datum(TEXT)], "cross_entropy")

    with pytest.raises(tinker.RequestFailedError, match=said):
        client.optim_step(params).result(BOUND_S)

    client.optim_step(FAST).result(BOUND_S)


def test_an_unserved_base_model_names_the_served_ones(
    service_client: tinker.ServiceClient,
) -> None:
    with pytest.raises(tinker.RequestFailedError, match=r"'org/other' is not served.*tiny"):
        service_client.create_lora_training_client("org/other").result(BOUND_S)


@pytest.mark.parametrize("rank", [0, 513])
def test_a_rank_out_of_range_is_refused(service_client: tinker.ServiceClient, rank: int) -> None:
    with pytest.raises(tinker.TinkerError, match=f"rank {rank} is out of range"):
        _client(service_client, rank=rank)


def test_capabilities_name_the_model_and_its_context(rest_client: tinker.RestClient) -> None:
    [model] = rest_client.get_server_capabilities().result(BOUND_S).supported_models

    assert (model.model_name, model.max_context_length) == (TINY, 4096)
