"""Ends: a session that is closed, a server that is killed, a program of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types
from tinker._base_client import AsyncHttpxClientWrapper

from servers import LocalServer, start_server
from tiny_data import TINY, sdk_datum, tokens_of

BOUND_S = 30.0
TEXT = "the cat sat"
FAST = types.AdamParams(learning_rate=1e-2)


def _service(server: LocalServer) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key)


def _losses(client: tinker.TrainingClient, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        done = client.forward_backward([sdk_datum(TEXT)], "cross_entropy")
        client.optim_step(FAST).result(BOUND_S)
        losses.append(done.result(BOUND_S).metrics["loss:sum"])
    return losses


def test_a_closed_session_serves_its_clients_no_more_and_says_so(tiny_server: LocalServer) -> None:
    service = _service(tiny_server)
    client = service.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    sampler = client.save_weights_and_get_sampling_client().result(BOUND_S)
    session_id, model_id = service.holder.get_session_id(), client.model_id
    assert sampler.compute_logprobs(types.ModelInput.from_ints([1, 2])).result(BOUND_S)

    service.close("success").result(BOUND_S)

    with httpx.Client(
        base_url=f"{tiny_server.base_url}/api/v1", headers={"X-API-Key": tiny_server.api_key}
    ) as http:
        info = http.post("/get_info", json={"model_id": model_id, "type": "get_info"})
        sampled = http.get(f"/samplers/{session_id}:sample:0")
    for answer in (info, sampled):
        assert answer.status_code == 400
        assert "is finished" in answer.json()["detail"]
    with pytest.raises(RuntimeError, match="closed"):
        service.create_lora_training_client(TINY, rank=2)


def test_a_closed_session_leaves_no_connection_to_the_garbage_collector(
    tiny_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK forgets two clients a session; open, they would end somebody else's connection."""
    monkeypatch.setenv("TINKER_TELEMETRY", "1")
    before = _http_clients()
    service = _service(tiny_server)
    service.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    own = _http_clients() - before
    assert any(map(_connections, own))
    service.close("success").result(BOUND_S)

    deadline = time.monotonic() + BOUND_S
    while any(map(_connections, own | (_http_clients() - before))):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _http_clients() -> set[httpx.AsyncClient]:
    return {one for one in gc.get_objects() if type(one) is AsyncHttpxClientWrapper}


def _connections(client: httpx.AsyncClient) -> list[object]:
    pool: Any = client._transport
    return list(pool._pool.connections)


def test_a_closed_session_frees_the_disk_of_its_unnamed_samplers(own_server: LocalServer) -> None:
    with _service(own_server) as service:
        client = service.create_lora_training_client(TINY, rank=2).result(BOUND_S)
        client.save_weights_and_get_sampling_client().result(BOUND_S)
        assert len(list((own_server.state_dir / "ephemeral").iterdir())) == 1

    with _service(own_server) as service:  # its client is made behind the end of the other session
        service.create_lora_training_client(TINY, rank=2).result(BOUND_S)
        assert list((own_server.state_dir / "ephemeral").iterdir()) == []


def test_after_a_kill_saved_states_are_there_and_old_clients_are_told(
    own_server: LocalServer,
) -> None:
    old = _service(own_server)
    client = old.create_lora_training_client(TINY, rank=2, seed=0).result(BOUND_S)
    losses = _losses(client, 2)
    path = client.save_state("two").result(BOUND_S).path
    uninterrupted = losses + _losses(client, 2)
    sampler = client.save_weights_and_get_sampling_client().result(BOUND_S)
    prompt = types.ModelInput.from_ints([97])
    pending = sampler.sample(prompt, 64, types.SamplingParams(max_tokens=4000, stop=[]))
    with pytest.raises(TimeoutError):
        pending.result(0.5)
    own_server.kill()

    # On the same port: elsewhere the old clients would find nobody, and ask for minutes.
    again = start_server(own_server.state_dir, "--port", str(own_server.port))
    try:
        with pytest.raises(ValueError, match="API key is missing or wrong"):
            pending.result(BOUND_S)
        with pytest.raises(tinker.AuthenticationError, match="`tinker-local env` prints"):
            client.forward_backward([sdk_datum(TEXT)], "cross_entropy").result(BOUND_S)
        rest = tinker.RestClient(base_url=again.base_url, api_key=again.api_key)
        [listed] = rest.list_user_checkpoints().result(BOUND_S).checkpoints
        assert listed.tinker_path == path
        with _service(again) as service:
            resumed = service.create_training_client_from_state_with_optimizer(path)
            assert losses + _losses(resumed.result(BOUND_S), 2) == uninterrupted
    finally:
        again.stop()


_PROGRAM = f"""
import json, tinker
from tinker import types

service = tinker.ServiceClient()
training = service.create_lora_training_client({TINY!r}, rank=2).result(30)
sampling = service.create_sampling_client(base_model={TINY!r}).result(30)
text = "hé 日本 \\n a"
print(json.dumps([tokenizer.get_tokenizer().encode(text) for tokenizer in (training, sampling)]))
service.close("success").result(30)
"""


def test_another_program_needs_the_env_variables_alone(
    tiny_server: LocalServer, tmp_path: Path
) -> None:
    inherited = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
    home = {"HOME": str(tmp_path), "TINKER_TELEMETRY": "0"}

    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**inherited, **home, **tiny_server.env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [tokens_of("hé 日本 \n a")] * 2
