"""Listing and deleting what was saved, with the real SDK."""

from __future__ import annotations

import pytest
import tinker

from tiny_data import TINY

BOUND_S = 30.0


@pytest.fixture(scope="module")
def saved(service_client: tinker.ServiceClient) -> list[str]:
    """Paths of three states and one sampler checkpoint of one run, oldest first."""
    client = service_client.create_lora_training_client(
        TINY, rank=2, seed=0, user_metadata={"made_by": "a test"}
    ).result(BOUND_S)
    states = [client.save_state(name, user_metadata={"name": name}) for name in ("a", "b", "c")]
    sampler = client.save_weights_for_sampler("a", ttl_seconds=7200)
    return [future.result(BOUND_S).path for future in (*states, sampler)]


def _run_id(paths: list[str]) -> str:
    return paths[0].removeprefix("tinker://").partition("/")[0]


def test_a_runs_checkpoints_are_listed_newest_first(
    rest_client: tinker.RestClient, saved: list[str]
) -> None:
    listed = rest_client.list_checkpoints(_run_id(saved)).result(BOUND_S).checkpoints

    assert [checkpoint.tinker_path for checkpoint in listed] == saved[::-1]
    sampler, newest = listed[0], listed[1]
    assert (sampler.checkpoint_type, newest.checkpoint_type) == ("sampler", "training")
    assert sampler.expires_at is not None
    assert (newest.expires_at, newest.user_metadata) == (None, {"name": "c"})
    assert newest.size_bytes is not None
    assert newest.size_bytes > 1000


def test_a_run_is_described(rest_client: tinker.RestClient, saved: list[str]) -> None:
    run = rest_client.get_training_run(_run_id(saved)).result(BOUND_S)

    assert (run.base_model, run.lora_rank, run.user_metadata) == (TINY, 2, {"made_by": "a test"})
    assert run.last_checkpoint is not None
    assert run.last_sampler_checkpoint is not None
    assert run.last_checkpoint.tinker_path == saved[2]
    assert run.last_sampler_checkpoint.tinker_path == saved[3]


def test_runs_come_in_pages(rest_client: tinker.RestClient, saved: list[str]) -> None:
    page = rest_client.list_training_runs(limit=100).result(BOUND_S)
    all_ids = [run.training_run_id for run in page.training_runs]
    assert _run_id(saved) in all_ids

    first = rest_client.list_training_runs(limit=1).result(BOUND_S)
    beyond = rest_client.list_training_runs(limit=5, offset=len(all_ids)).result(BOUND_S)

    assert [run.training_run_id for run in first.training_runs] == all_ids[:1]
    assert (first.cursor.limit, first.cursor.total_count) == (1, len(all_ids))
    assert beyond.training_runs == []


def test_all_checkpoints_come_in_pages(rest_client: tinker.RestClient, saved: list[str]) -> None:
    everything = []
    while True:
        found = rest_client.list_user_checkpoints(limit=100, offset=len(everything)).result(BOUND_S)
        if not found.checkpoints:
            break
        everything += found.checkpoints
    paths = [checkpoint.tinker_path for checkpoint in everything]
    assert set(saved) <= set(paths)

    page = rest_client.list_user_checkpoints(limit=2, offset=1).result(BOUND_S)

    assert [checkpoint.tinker_path for checkpoint in page.checkpoints] == paths[1:3]
    assert page.cursor is not None
    assert page.cursor.total_count == len(paths)


def test_a_deleted_checkpoint_is_gone_and_cannot_be_loaded(
    service_client: tinker.ServiceClient, rest_client: tinker.RestClient
) -> None:
    client = service_client.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    path = client.save_state("short").result(BOUND_S).path

    rest_client.delete_checkpoint_from_tinker_path(path).result(BOUND_S)

    run_id = path.removeprefix("tinker://").partition("/")[0]
    assert rest_client.list_checkpoints(run_id).result(BOUND_S).checkpoints == []
    with pytest.raises(tinker.NotFoundError):
        rest_client.delete_checkpoint_from_tinker_path(path).result(BOUND_S)
    with pytest.raises(tinker.RequestFailedError, match="No checkpoint"):
        service_client.create_training_client_from_state(path).result(BOUND_S)


def test_a_taken_name_is_refused_unless_overwritten(service_client: tinker.ServiceClient) -> None:
    client = service_client.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    path = client.save_state("same").result(BOUND_S).path

    with pytest.raises(tinker.RequestFailedError, match="'same' is taken"):
        client.save_state("same").result(BOUND_S)

    assert client.save_state("same", overwrite=True).result(BOUND_S).path == path


@pytest.mark.parametrize("name", ["../escape", "a/b", ".hidden"])
def test_a_name_that_could_leave_its_folder_is_refused(
    service_client: tinker.ServiceClient, name: str
) -> None:
    client = service_client.create_lora_training_client(TINY, rank=2).result(BOUND_S)

    with pytest.raises(tinker.RequestFailedError, match="no usable checkpoint name"):
        client.save_state(name).result(BOUND_S)


def test_training_on_from_sampler_weights_is_refused(
    service_client: tinker.ServiceClient, saved: list[str]
) -> None:
    with pytest.raises(tinker.RequestFailedError, match="holds weights for sampling"):
        service_client.create_training_client_from_state(saved[3]).result(BOUND_S)
