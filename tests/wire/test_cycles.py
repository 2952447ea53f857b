"""The simulated clock under the real SDK: what a loop's shape costs in cycles."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from servers import LocalServer, start_server
from tiny_data import TINY, sdk_datum

BOUND_S = 60.0
STEPS = 3
STEP = types.AdamParams(learning_rate=1e-3)
DATA = [sdk_datum("the cat sat on the mat")]


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server that picks work up twice a second."""
    server = start_server(tmp_path_factory.mktemp("cycles") / "state", "--cycle-s", "0.5")
    yield server
    server.stop()


@pytest.fixture
def client(slow_server: LocalServer) -> Iterator[tinker.TrainingClient]:
    with tinker.ServiceClient(
        base_url=slow_server.base_url, api_key=slow_server.api_key
    ) as service:
        yield service.create_lora_training_client(TINY, rank=2, seed=0).result(BOUND_S)


def _stats(server: LocalServer) -> dict[str, Any]:
    answer = httpx.get(f"{server.base_url}/stats", headers={"X-API-Key": server.api_key})
    stats: dict[str, Any] = answer.raise_for_status().json()
    return stats


def _wait_for_a_tick(server: LocalServer) -> None:
    """So that what is sent next arrives within one cycle."""
    before, give_up_at = _stats(server)["cycles"], time.monotonic() + BOUND_S
    while _stats(server)["cycles"] == before:
        assert time.monotonic() < give_up_at


def _cycles_of(server: LocalServer, client: tinker.TrainingClient) -> dict[str, int]:
    cycles: dict[str, int] = _stats(server)["cycles_by_training_client"][client.model_id]
    return cycles


def _used_by(
    server: LocalServer, client: tinker.TrainingClient, train: Callable[[], None]
) -> tuple[int, int]:
    """Cycles used and steps taken in `train`; making the client took a cycle of its own."""
    before = _cycles_of(server, client)
    train()
    after = _cycles_of(server, client)
    return after["used"] - before["used"], after["steps"] - before["steps"]


def test_a_loop_that_sends_both_at_once_uses_a_cycle_a_step(
    slow_server: LocalServer, client: tinker.TrainingClient
) -> None:
    def train() -> None:
        _wait_for_a_tick(slow_server)
        sent = [
            (client.forward_backward(DATA, "cross_entropy"), client.optim_step(STEP))
            for _ in range(STEPS)
        ]
        for future in itertools.chain.from_iterable(sent):
            future.result(BOUND_S)

    assert _used_by(slow_server, client, train) == (STEPS, STEPS)


def test_a_loop_that_waits_between_them_uses_two_cycles_a_step(
    slow_server: LocalServer, client: tinker.TrainingClient
) -> None:
    def train() -> None:
        for _ in range(STEPS):
            client.forward_backward(DATA, "cross_entropy").result(BOUND_S)
            client.optim_step(STEP).result(BOUND_S)

    assert _used_by(slow_server, client, train) == (2 * STEPS, STEPS)


def test_a_clocked_run_learns_what_an_unclocked_one_does(
    client: tinker.TrainingClient, service_client: tinker.ServiceClient
) -> None:
    free = service_client.create_lora_training_client(TINY, rank=2, seed=0).result(BOUND_S)

    def losses(trained: tinker.TrainingClient) -> list[float]:
        done = []
        for _ in range(2):
            done.append(trained.forward_backward(DATA, "cross_entropy"))
            trained.optim_step(STEP)
        return [future.result(BOUND_S).metrics["loss:sum"] for future in done]

    assert losses(client) == losses(free)


def test_what_waits_for_the_next_tick_is_in_the_queue(
    slow_server: LocalServer, client: tinker.TrainingClient
) -> None:
    _wait_for_a_tick(slow_server)
    sent = [client.forward_backward(DATA, "cross_entropy") for _ in range(2)]
    give_up_at = time.monotonic() + BOUND_S

    queued = 0
    while not all(future.future().done() for future in sent):
        queued = max(
            queued, _stats(slow_server)["queued_training_requests"].get(client.model_id, 0)
        )
        assert time.monotonic() < give_up_at

    assert queued == 2
    assert _stats(slow_server)["queued_training_requests"] == {}


def test_sampling_does_not_wait_for_the_clock(
    slow_server: LocalServer, client: tinker.TrainingClient
) -> None:
    sampler = client.save_weights_and_get_sampling_client().result(BOUND_S)
    prompt = types.ModelInput.from_ints([97])
    before = _cycles_of(slow_server, client)

    for _ in range(3):
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=2)).result(BOUND_S)

    assert _cycles_of(slow_server, client) == before
    assert _stats(slow_server)["cycle_s"] == 0.5
