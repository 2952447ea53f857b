"""How long checkpoints are kept, who may see them, and copies of them, with the real SDK."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import tinker

from servers import LocalServer
from tiny_data import TINY, sdk_datum

BOUND_S = 30.0


@pytest.fixture(scope="module")
def client(service_client: tinker.ServiceClient) -> tinker.TrainingClient:
    return service_client.create_lora_training_client(TINY, rank=2, seed=0).result(BOUND_S)


@pytest.fixture(scope="module")
def http(tiny_server: LocalServer) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=f"{tiny_server.base_url}/api/v1", headers={"X-API-Key": tiny_server.api_key}
    ) as client:
        yield client


@pytest.fixture
def state(client: tinker.TrainingClient) -> str:
    """The path of a state of its own."""
    return client.save_state(f"s-{uuid.uuid4().hex}").result(BOUND_S).path


def _run_id(path: str) -> str:
    return path.removeprefix("tinker://").partition("/")[0]


def _listed(rest_client: tinker.RestClient, path: str) -> tinker.types.Checkpoint | None:
    all_of_run = rest_client.list_checkpoints(_run_id(path)).result(BOUND_S).checkpoints
    return next((checkpoint for checkpoint in all_of_run if checkpoint.tinker_path == path), None)


def _folder(server: LocalServer, path: str) -> Path:
    run_id, kind, name = path.removeprefix("tinker://").split("/")
    return server.state_dir / "runs" / run_id.replace(":", "_") / kind / name


def _wait_until(is_done: Callable[[], bool]) -> None:
    limit = time.monotonic() + BOUND_S
    while not is_done():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_an_expired_checkpoint_is_neither_listed_nor_loaded_and_leaves_the_disk(
    tiny_server: LocalServer,
    service_client: tinker.ServiceClient,
    rest_client: tinker.RestClient,
    client: tinker.TrainingClient,
) -> None:
    path = client.save_state("brief", ttl_seconds=1).result(BOUND_S).path

    _wait_until(lambda: not _folder(tiny_server, path).exists())

    assert _listed(rest_client, path) is None
    with pytest.raises(tinker.RequestFailedError, match="No checkpoint"):
        service_client.create_training_client_from_state(path).result(BOUND_S)
    with pytest.raises(tinker.NotFoundError):
        service_client.create_sampling_client(model_path=path).result(BOUND_S)


def test_a_ttl_is_set_extended_and_removed(rest_client: tinker.RestClient, state: str) -> None:
    for ttl_s in (3600, 86_400):
        rest_client.set_checkpoint_ttl_from_tinker_path(state, ttl_s).result(BOUND_S)
        listed = _listed(rest_client, state)
        assert listed is not None
        assert listed.expires_at is not None
        left = listed.expires_at - datetime.now(UTC)
        assert timedelta(seconds=ttl_s - 60) < left <= timedelta(seconds=ttl_s)

    rest_client.set_checkpoint_ttl_from_tinker_path(state, None).result(BOUND_S)

    kept = _listed(rest_client, state)
    assert kept is not None
    assert kept.expires_at is None


def test_a_shortened_ttl_comes_true(
    tiny_server: LocalServer, rest_client: tinker.RestClient, state: str
) -> None:
    rest_client.set_checkpoint_ttl_from_tinker_path(state, 1).result(BOUND_S)

    _wait_until(lambda: not _folder(tiny_server, state).exists())

    assert _listed(rest_client, state) is None


@pytest.mark.parametrize("ttl_s", [0, -5, 315_360_001])
def test_a_ttl_out_of_range_is_refused(
    rest_client: tinker.RestClient, state: str, ttl_s: int
) -> None:
    with pytest.raises(tinker.BadRequestError, match=f"ttl_seconds is {ttl_s}"):
        rest_client.set_checkpoint_ttl_from_tinker_path(state, ttl_s).result(BOUND_S)


def test_a_misspelt_ttl_does_not_remove_the_one_there_is(http: httpx.Client, state: str) -> None:
    answer = http.put(
        f"/training_runs/{_run_id(state)}/checkpoints/weights/{state.rpartition('/')[2]}/ttl",
        json={"ttl": 3600},
    )

    assert answer.status_code == 400


def test_a_checkpoint_is_published_and_unpublished(
    rest_client: tinker.RestClient, state: str
) -> None:
    def is_public() -> bool:
        listed = _listed(rest_client, state)
        assert listed is not None
        return listed.public

    assert not is_public()
    for _ in range(2):  # a repetition is no error: the SDK would ask again for five minutes
        rest_client.publish_checkpoint_from_tinker_path(state).result(BOUND_S)
        assert is_public()
    for _ in range(2):
        rest_client.unpublish_checkpoint_from_tinker_path(state).result(BOUND_S)
        assert not is_public()


def test_what_is_not_there_cannot_be_changed(rest_client: tinker.RestClient, state: str) -> None:
    missing = state + "-other"
    for refused in (
        rest_client.publish_checkpoint_from_tinker_path(missing),
        rest_client.unpublish_checkpoint_from_tinker_path(missing),
        rest_client.set_checkpoint_ttl_from_tinker_path(missing, 3600),
        rest_client.copy_weights(missing, "any-project"),
    ):
        with pytest.raises(tinker.NotFoundError, match="No checkpoint"):
            refused.result(BOUND_S)


def test_a_copy_is_a_checkpoint_of_its_own(
    service_client: tinker.ServiceClient,
    rest_client: tinker.RestClient,
    client: tinker.TrainingClient,
) -> None:
    source = client.save_state("source", user_metadata={"step": "1"}).result(BOUND_S).path

    copied = rest_client.copy_weights(
        source, "any-project", ttl_seconds=7200, weights_access_token="not needed for one's own"
    ).result(BOUND_S)
    rest_client.delete_checkpoint_from_tinker_path(source).result(BOUND_S)

    assert _run_id(copied) != _run_id(source)
    assert copied.endswith("/weights/source")
    listed = _listed(rest_client, copied)
    assert listed is not None
    assert (listed.checkpoint_type, listed.user_metadata) == ("training", {"step": "1"})
    assert listed.expires_at is not None
    assert service_client.create_training_client_from_state_with_optimizer(copied).result(BOUND_S)


def test_a_copy_belongs_to_the_project_it_was_made_for(
    tiny_server: LocalServer, rest_client: tinker.RestClient, state: str
) -> None:
    project = f"archive-{uuid.uuid4().hex}"
    with tinker.ServiceClient(
        base_url=tiny_server.base_url, api_key=tiny_server.api_key, project_id=project
    ) as archive:
        copied = archive.copy_weights(state).result(BOUND_S)

    runs = rest_client.list_training_runs(project_id=project).result(BOUND_S)
    everything = rest_client.list_training_runs(limit=100).result(BOUND_S)
    assert [run.training_run_id for run in runs.training_runs] == [_run_id(copied)]
    assert runs.cursor.total_count == 1 < everything.cursor.total_count
    session = rest_client.get_session(_run_id(copied).partition(":")[0]).result(BOUND_S)
    assert session.training_run_ids == [_run_id(copied)]


def test_a_copy_cannot_be_trained(
    http: httpx.Client, rest_client: tinker.RestClient, state: str
) -> None:
    copied = rest_client.copy_weights(state, "any-project").result(BOUND_S)

    step = {"model_id": _run_id(copied), "seq_id": 1, "adam_params": {}}
    promised = http.post("/optim_step", json=step).json()
    outcome = http.post("/retrieve_future", json={"request_id": promised["request_id"]}).json()

    assert outcome["category"] == "user"


def test_a_copy_keeps_its_kind(
    service_client: tinker.ServiceClient,
    rest_client: tinker.RestClient,
    client: tinker.TrainingClient,
) -> None:
    source = client.save_weights_for_sampler("to-copy").result(BOUND_S).path

    copied = rest_client.copy_weights(source, "any-project").result(BOUND_S)

    assert copied.endswith("/sampler_weights/to-copy")
    sampler = service_client.create_sampling_client(model_path=copied).result(BOUND_S)
    assert sampler.compute_logprobs(tinker.ModelInput.from_ints([97, 98])).result(BOUND_S)


def test_a_copy_asked_for_again_after_a_lost_answer_is_made_once(
    http: httpx.Client, state: str
) -> None:
    body = {"source_path": state, "destination_project_id": "any-project"}
    key = {"X-Idempotency-Key": str(uuid.uuid4())}

    paths = [
        http.post("/copy_weights", json=body, headers=key).json()["tinker_path"] for _ in range(2)
    ]
    other = http.post("/copy_weights", json=body, headers={"X-Idempotency-Key": str(uuid.uuid4())})

    assert paths[0] == paths[1]
    assert other.json()["tinker_path"] != paths[0]


def test_a_copy_does_not_land_in_a_training_client(
    http: httpx.Client, client: tinker.TrainingClient, state: str
) -> None:
    session_id, _, number = client.model_id.partition(":train:")
    body = {"source_path": state, "session_id": session_id}

    into_client = http.post("/copy_weights", json={**body, "model_seq_id": int(number)})
    beside = http.post("/copy_weights", json={**body, "model_seq_id": 999})
    half = http.post("/copy_weights", json=body)

    assert (into_client.status_code, half.status_code) == (400, 400)
    assert "is a training client" in into_client.json()["detail"]
    assert beside.json()["tinker_path"].startswith(f"tinker://{session_id}:train:999/weights/")


def test_a_checkpoint_tells_what_a_client_must_know_to_load_it(
    service_client: tinker.ServiceClient, rest_client: tinker.RestClient
) -> None:
    client = service_client.create_lora_training_client(
        TINY, rank=3, train_unembed=False, train_attn=True, train_mlp=True
    ).result(BOUND_S)
    path = client.save_state("any").result(BOUND_S).path

    info = rest_client.get_weights_info_by_tinker_path(path).result(BOUND_S)

    assert info.model_dump() == {
        "base_model": TINY,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": 3,
        "train_unembed": False,
        "train_mlp": True,
        "train_attn": True,
    }


def test_a_save_without_a_name_gets_one(
    http: httpx.Client, rest_client: tinker.RestClient, service_client: tinker.ServiceClient
) -> None:
    client = service_client.create_lora_training_client(TINY, rank=2).result(BOUND_S)

    promised = http.post("/save_weights", json={"model_id": client.model_id, "seq_id": 1}).json()
    saved = http.post("/retrieve_future", json={"request_id": promised["request_id"]}).json()

    assert saved["path"] == f"tinker://{client.model_id}/weights/000001"
    assert _listed(rest_client, saved["path"]) is not None


def test_an_access_token_is_accepted_for_ones_own_checkpoints(
    service_client: tinker.ServiceClient, state: str
) -> None:
    assert service_client.create_training_client_from_state(
        state, weights_access_token="any"
    ).result(BOUND_S)


def _losses(client: tinker.TrainingClient, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        done = client.forward_backward([sdk_datum("the cat sat")], "cross_entropy")
        client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result(BOUND_S)
        losses.append(done.result(BOUND_S).metrics["loss:sum"])
    return losses


@pytest.mark.filterwarnings("ignore:.*load_state:FutureWarning")
def test_a_training_client_can_go_back_to_a_state_of_its_own(
    service_client: tinker.ServiceClient,
) -> None:
    client = service_client.create_lora_training_client(TINY, rank=2, seed=0).result(BOUND_S)
    _losses(client, 2)
    path = client.save_state("two").result(BOUND_S).path
    first_time = _losses(client, 2)
    client.forward_backward([sdk_datum("forgotten")], "cross_entropy").result(BOUND_S)

    client.load_state_with_optimizer(path).result(BOUND_S)
    with_optimizer = _losses(client, 2)
    client.load_state(path).result(BOUND_S)
    without = _losses(client, 2)

    assert with_optimizer == first_time
    assert without[0] == first_time[0]
    assert without[1] != first_time[1]


@pytest.mark.filterwarnings("ignore:.*load_state:FutureWarning")
def test_a_state_of_another_rank_is_refused_in_place_and_the_client_goes_on(
    service_client: tinker.ServiceClient, state: str
) -> None:
    other = service_client.create_lora_training_client(TINY, rank=3).result(BOUND_S)

    with pytest.raises(tinker.RequestFailedError, match=r"at rank 2 .* of .* at rank 3"):
        other.load_state(state).result(BOUND_S)

    assert len(_losses(other, 1)) == 1


_TINKER = """
import json, sys
from tinker.cli.__main__ import main_cli

for args in json.loads(sys.argv[1]):
    main_cli(args, standalone_mode=False)
    print(end="\\x1e", flush=True)
"""
"""The SDK's `tinker` command, several in one process: its imports take two seconds."""


def _tinker_checkpoint(server: LocalServer, cwd: Path, *commands: str) -> list[str]:
    """What each `tinker checkpoint <command>` prints when it runs in `cwd` against `server`."""
    argvs = [["--format", "json", "checkpoint", *command.split()] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", _TINKER, json.dumps(argvs)],
        env={**os.environ, "TINKER_TELEMETRY": "0", **server.env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.split("\x1e")[:-1]


def test_the_sdks_command_line_manages_checkpoints(
    tiny_server: LocalServer, state: str, tmp_path: Path
) -> None:
    _, _, before, _, _, of_run, _, deleted, after = _tinker_checkpoint(
        tiny_server,
        tmp_path,
        f"publish {state}",
        f"set-ttl {state} --ttl 7200",
        f"info {state}",
        f"unpublish {state}",
        f"set-ttl {state} --remove",
        f"list --run-id {_run_id(state)}",
        f"download {state}",
        f"delete {state} --yes",
        "list --limit 0",
    )

    info = json.loads(before)
    assert (info["public"], info["lora_rank"], info["size_bytes"] > 0) == (True, 2, True)
    assert info["expires_at"] is not None
    [mine] = [c for c in json.loads(of_run)["checkpoints"] if c["tinker_path"] == state]
    assert (mine["public"], mine["expires_at"]) == (False, None)
    [folder] = tmp_path.iterdir()
    assert folder.name == state.removeprefix("tinker://").replace("/", "_")
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads(deleted) == {"deleted_count": 1, "failed": []}
    paths = [checkpoint["tinker_path"] for checkpoint in json.loads(after)["checkpoints"]]
    assert state not in paths
    assert "download" not in [path.rpartition("/")[2] for path in paths]
