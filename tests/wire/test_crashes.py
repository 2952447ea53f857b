"""A server that is killed, at its worst moments, and the next one on its state directory."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tinker

from servers import LocalServer, start_server
from tiny_data import TINY, sdk_datum

BOUND_S = 30.0
RANK = 64
KILLS = 3
"""Each costs the start of a server."""


@contextmanager
def _http(server: LocalServer) -> Iterator[httpx.Client]:
    """Requests without the SDK, which would ask a killed server again for minutes."""
    with httpx.Client(
        base_url=f"{server.base_url}/api/v1",
        headers={"X-API-Key": server.api_key},
        timeout=BOUND_S,
    ) as client:
        yield client


def _post(http: httpx.Client, path: str, /, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def _outcome(http: httpx.Client, promised: dict[str, Any]) -> dict[str, Any]:
    return _post(http, "/retrieve_future", request_id=promised["request_id"])


def _new_client(http: httpx.Client) -> str:
    """The id of a training client whose files take a few milliseconds to write."""
    session = _post(http, "/create_session", tags=[], user_metadata={}, sdk_version="0.38.0")
    promised = _post(
        http,
        "/create_model",
        session_id=session["session_id"],
        model_seq_id=0,
        base_model=TINY,
        lora_config={"rank": RANK},
    )
    model_id: str = _outcome(http, promised)["model_id"]
    return model_id


def _unfinished(server: LocalServer) -> list[Path]:
    return list((server.state_dir / "unfinished").iterdir())


def _kill_in_the_middle_of_a_save(server: LocalServer) -> None:
    """Stop the server again and again until it stands within a save, and kill it there."""
    process = psutil.Process(server.pid)
    limit = time.monotonic() + BOUND_S
    while time.monotonic() < limit:
        os.kill(server.pid, signal.SIGSTOP)
        while process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < limit
        if _unfinished(server):
            server.kill()
            return
        os.kill(server.pid, signal.SIGCONT)
        time.sleep(0.002)
    server.kill()
    raise AssertionError("no save was met")


def _saves(model_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Saves without end, of every kind, by endpoint: new names, and one that is overwritten."""
    for seq_id in itertools.count(1):
        save = {"model_id": model_id, "seq_id": seq_id, "path": f"s{seq_id}"}
        match seq_id % 4:
            case 0:
                yield "/save_weights_for_sampler", save
            case 1:
                yield "/save_weights", {**save, "path": "latest", "overwrite": True}
            case 2:
                yield "/save_weights_external", save
            case 3:
                yield "/save_weights", save


def _save_until_the_end(server: LocalServer, saves: Iterator[tuple[str, dict[str, Any]]]) -> None:
    with _http(server) as http, contextlib.suppress(httpx.TransportError):
        for path, save in saves:
            _post(http, path, **save)


def test_what_was_saved_before_a_kill_is_whole_after_it_and_nothing_else_is_listed(
    tmp_path: Path,
) -> None:
    server = start_server(tmp_path / "state")
    told: set[str] = set()
    try:
        for _ in range(KILLS):
            with _http(server) as http:
                saves = _saves(_new_client(http))
                first = [_post(http, path, **save) for path, save in itertools.islice(saves, 12)]
                told |= {_outcome(http, promised)["path"] for promised in first}
            saver = threading.Thread(target=_save_until_the_end, args=(server, saves))
            saver.start()
            _kill_in_the_middle_of_a_save(server)
            saver.join(BOUND_S)
            server = start_server(server.state_dir)

            listed = _check_all(server)

            assert told <= listed
            assert _unfinished(server) == []
            told |= listed
    finally:
        server.stop()


def _check_all(server: LocalServer) -> set[str]:
    """Use each checkpoint that is listed for what it is for; their paths."""
    rest = tinker.RestClient(base_url=server.base_url, api_key=server.api_key)
    listed = rest.list_user_checkpoints(limit=1000).result(BOUND_S).checkpoints
    with tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key) as service:
        for checkpoint in listed:
            path = checkpoint.tinker_path
            if checkpoint.checkpoint_type == "training":
                service.create_training_client_from_state_with_optimizer(path).result(BOUND_S)
            elif checkpoint.checkpoint_type == "sampler":
                sampler = service.create_sampling_client(model_path=path).result(BOUND_S)
                sampler.compute_logprobs(tinker.ModelInput.from_ints([97, 98])).result(BOUND_S)
            else:
                urls = rest.get_external_weights_urls(path).result(BOUND_S).urls
                sizes = [len(httpx.get(url).content) for url in urls.values()]
                assert sum(sizes) == checkpoint.size_bytes
    return {checkpoint.tinker_path for checkpoint in listed}


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalServer, str]]:
    """A server in place of a killed one, and the training client that went with that one.

    The client had saved a state "one" and had two sampling clients, with and without a name.
    """
    server = start_server(tmp_path_factory.mktemp("restarted") / "state")
    try:
        with _http(server) as http:
            model_id = _new_client(http)
            session_id = model_id.partition(":")[0]
            for seq_id, path, body in (
                (1, "/save_weights", {"path": "one"}),
                (2, "/save_weights_for_sampler", {"path": "one"}),
                (3, "/save_weights_for_sampler", {"sampling_session_seq_id": 0}),
            ):
                promised = _post(http, path, model_id=model_id, seq_id=seq_id, **body)
                saved = _outcome(http, promised)
                assert "error" not in saved, saved
            _post(
                http,
                "/create_sampling_session",
                session_id=session_id,
                sampling_session_seq_id=1,
                model_path=f"tinker://{model_id}/sampler_weights/one",
            )
    finally:
        server.kill()
    server = start_server(server.state_dir)
    yield server, model_id
    server.stop()


def test_a_request_for_a_lost_training_client_names_it_and_its_last_state(
    restarted: tuple[LocalServer, str],
) -> None:
    server, model_id = restarted
    expected = f"create_training_client_from_state_with_optimizer('tinker://{model_id}/weights/one"
    with _http(server) as http:
        for path, body in (
            ("/optim_step", {"adam_params": {}}),
            ("/save_weights", {"path": "two"}),
            ("/save_weights_external", {"path": "two"}),
        ):
            # It may number its requests from where it was: none of them can be in order now.
            promised = _post(http, path, model_id=model_id, seq_id=4, **body)
            outcome = _outcome(http, promised)
            assert outcome["category"] == "user"
            assert model_id in outcome["error"]
            assert expected in outcome["error"]
        info = http.post("/get_info", json={"model_id": model_id})
    assert info.status_code == 404
    assert expected in info.json()["detail"]


def test_a_request_for_a_lost_sampling_client_names_it_and_what_it_sampled_from(
    restarted: tuple[LocalServer, str],
) -> None:
    server, model_id = restarted
    session_id = model_id.partition(":")[0]
    with _http(server) as http:
        named = http.get(f"/samplers/{session_id}:sample:1")
        unnamed = http.get(f"/samplers/{session_id}:sample:0")

    assert (named.status_code, unnamed.status_code) == (404, 404)
    assert f"{session_id}:sample:1" in named.json()["detail"]
    assert f"'tinker://{model_id}/sampler_weights/one'" in named.json()["detail"]
    assert f"{session_id}:sample:0" in unnamed.json()["detail"]


def test_a_request_in_a_lost_session_names_it(restarted: tuple[LocalServer, str]) -> None:
    server, model_id = restarted
    session_id = model_id.partition(":")[0]
    with _http(server) as http:
        answer = http.post(
            "/create_model",
            json={
                "session_id": session_id,
                "model_seq_id": 1,
                "base_model": TINY,
                "lora_config": {"rank": 2},
            },
        )

    assert answer.status_code == 404
    assert session_id in answer.json()["detail"]
    assert "new ServiceClient" in answer.json()["detail"]


def test_a_result_that_was_never_fetched_names_its_request(
    restarted: tuple[LocalServer, str],
) -> None:
    server, model_id = restarted
    with _http(server) as http:
        outcome = _outcome(http, {"request_id": f"{model_id}:2"})

    assert outcome["category"] == "user"
    assert model_id in outcome["error"]
    assert "last saved state" in outcome["error"]


def test_a_lost_training_client_goes_on_from_its_state(
    restarted: tuple[LocalServer, str],
) -> None:
    server, model_id = restarted
    with tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key) as service:
        client = service.create_training_client_from_state_with_optimizer(
            f"tinker://{model_id}/weights/one"
        ).result(BOUND_S)
        done = client.forward_backward([sdk_datum("the cat sat")], "cross_entropy")
        assert done.result(BOUND_S).metrics["loss:sum"] > 0
