"""The real SDK against a server inside the test's process, whose engine or client goes wrong."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tinker
import uvicorn
from tinker import types

from tinker_local.engine import TorchEngine
from tinker_local.ops import AdamParams, SampleOutput
from tinker_local.service import create_app
from tinker_local.service.guard import Guard
from tiny_data import TINY, sdk_datum

BOUND_S = 30.0
KEY = "tml-local-test"
STEP = types.AdamParams(learning_rate=1e-3)
DATA = [sdk_datum("the cat sat on the mat")]
ANSWER = types.SamplingParams(max_tokens=2)
PROMPT = types.ModelInput.from_ints([97])


class _FaultyEngine(TorchEngine):
    """Fails once at each of the things that are set in `faults`."""

    def __init__(self, folder: Path) -> None:
        super().__init__({TINY: folder}, "float32")
        self.faults: set[str] = set()

    def optim_step(self, model_id: str, params: AdamParams) -> Mapping[str, float]:
        self._fail("optim_step")
        return super().optim_step(model_id, params)

    def continue_samples(self) -> Mapping[str, SampleOutput | Exception]:
        self._fail("continue_samples")
        return super().continue_samples()

    def _fail(self, name: str) -> None:
        if name in self.faults:
            self.faults.remove(name)
            raise RuntimeError(f"no memory for {name}")


@contextlib.contextmanager
def _listening(engine: TorchEngine, state_dir: Path, **options: Any) -> Iterator[str]:
    """A server in a thread; its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = Guard(create_app(engine, state_dir, **options), KEY)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(BOUND_S)
        listener.close()


@pytest.fixture
def faulty_engine(tiny_folder: Path) -> _FaultyEngine:
    return _FaultyEngine(tiny_folder)


@pytest.fixture
def service(faulty_engine: _FaultyEngine, tmp_path: Path) -> Iterator[tinker.ServiceClient]:
    """The SDK's client of a server that waits 0.2 s for a request that is missing."""
    with (
        _listening(faulty_engine, tmp_path, gap_s=0.2) as base_url,
        tinker.ServiceClient(base_url=base_url, api_key=KEY) as client,
    ):
        yield client


@pytest.fixture
def client(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(TINY, rank=2, seed=0).result(BOUND_S)


def _step(client: tinker.TrainingClient) -> types.OptimStepResponse:
    client.forward_backward(DATA, "cross_entropy")
    return client.optim_step(STEP).result(BOUND_S)


def test_a_datum_that_the_sdk_cannot_encode_costs_one_step_and_hangs_nothing(
    client: tinker.TrainingClient,
) -> None:
    pointer = types.ImageAssetPointerChunk(format="png", location="x", expected_tokens=1)
    datum = types.Datum(
        model_input=types.ModelInput(chunks=[pointer]), loss_fn_inputs={"target_tokens": [98]}
    )

    # The SDK has counted the request when it fails to encode it, so the server never sees it.
    with pytest.raises(Exception, match=r"(?i)asset"):
        client.forward_backward([datum], "cross_entropy").result(BOUND_S)

    with pytest.raises(tinker.RequestFailedError, match="request 1 of this client never") as failed:
        _step(client)
    assert failed.value.category == types.RequestErrorCategory.User
    assert _step(client)


def test_a_fault_in_training_is_the_servers_and_the_client_goes_on(
    client: tinker.TrainingClient, faulty_engine: _FaultyEngine
) -> None:
    faulty_engine.faults.add("optim_step")

    with pytest.raises(tinker.RequestFailedError, match="no memory for optim_step") as failed:
        _step(client)

    assert failed.value.category == types.RequestErrorCategory.Server
    assert _step(client)


def test_a_fault_in_sampling_is_the_servers_and_the_client_goes_on(
    service: tinker.ServiceClient, faulty_engine: _FaultyEngine
) -> None:
    sampler = service.create_sampling_client(base_model=TINY).result(BOUND_S)
    faulty_engine.faults.add("continue_samples")

    with pytest.raises(tinker.RequestFailedError, match="no memory for continue") as failed:
        sampler.sample(PROMPT, 1, ANSWER).result(BOUND_S)

    assert failed.value.category == types.RequestErrorCategory.Server
    assert sampler.sample(PROMPT, 1, ANSWER).result(BOUND_S).sequences


def test_a_users_mistake_is_the_users(client: tinker.TrainingClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match="no gradient to apply") as failed:
        client.optim_step(STEP).result(BOUND_S)

    assert failed.value.category == types.RequestErrorCategory.User
