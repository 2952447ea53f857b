"""Who calls, what was done and what was used, as the real SDK asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import tinker
from tinker import types

from servers import LocalServer
from tiny_data import TINY

BOUND_S = 30.0


@pytest.fixture(scope="module")
def admin(tiny_server: LocalServer) -> tinker.AdminClient:
    return tinker.AdminClient(base_url=tiny_server.base_url, api_key=tiny_server.api_key)


@pytest.fixture
def training(tiny_server: LocalServer) -> Iterator[tinker.TrainingClient]:
    """A training client in a session of the test's own, which has a saved state."""
    with tinker.ServiceClient(
        base_url=tiny_server.base_url,
        api_key=tiny_server.api_key,
        project_id="bill",
        user_metadata={"who": "pays"},
    ) as service:
        client = service.create_lora_training_client(TINY, rank=2).result(BOUND_S)
        client.save_state("billed").result(BOUND_S)
        yield client


def _this_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def _http(server: LocalServer, credential: str) -> httpx.Client:
    return httpx.Client(base_url=f"{server.base_url}/api/v1", headers={"X-API-Key": credential})


def _token(server: LocalServer, credential: str) -> str:
    with _http(server, credential) as http:
        return str(http.post("/auth/token", json={}).raise_for_status().json()["jwt"])


def test_whoami_names_the_one_user(rest_client: tinker.RestClient) -> None:
    told = rest_client.whoami().result(BOUND_S)

    assert told.user_urn == "tml:organization_user:local"
    assert told.org_urn == "tml:organization:local"
    assert told.email is None


def test_a_token_is_as_good_as_the_key(tiny_server: LocalServer) -> None:
    token = _token(tiny_server, tiny_server.api_key)

    rest = tinker.RestClient(base_url=tiny_server.base_url, api_key=token)

    told = rest.get_server_capabilities().result(BOUND_S)
    assert [model.model_name for model in told.supported_models] == [TINY]


def test_a_token_cannot_be_made_to_live_longer_by_exchanging_it(tiny_server: LocalServer) -> None:
    from tinker.lib._jwt_auth import jwt_claims

    first = _token(tiny_server, tiny_server.api_key)
    second = _token(tiny_server, first)

    assert jwt_claims(second)["exp"] == jwt_claims(first)["exp"]


def test_the_key_tells_whose_it_is_as_auth_login_asks(tiny_server: LocalServer) -> None:
    from tinker.cli.auth_api import TinkerAuthApi

    with httpx.Client() as http:
        told = TinkerAuthApi(http, base_url=tiny_server.base_url).get_self_api_key(
            tiny_server.api_key
        )

    assert told.name == "tinker-local"
    assert "tinker-local env" in told.note


def test_the_audit_log_tells_what_was_made_and_deleted_today(
    admin: tinker.AdminClient, rest_client: tinker.RestClient, training: tinker.TrainingClient
) -> None:
    path = training.save_state("deleted").result(BOUND_S).path
    rest_client.delete_checkpoint_from_tinker_path(path).result(BOUND_S)
    rest_client.assign_session_project(training.holder.get_session_id(), "new").result(BOUND_S)

    def events(kind: str) -> list[tuple[str, str]]:
        entries = admin.get_audit_log(kind).result(BOUND_S).entries  # type: ignore[arg-type]
        assert entries == sorted(entries, key=lambda entry: entry.timestamp)
        return [(entry.event, str(entry.event_details)) for entry in entries]

    run_id = training.model_id
    every = events("all")
    assert ("checkpoint_delete", path) in [(e, path) for e, text in every if path in text]
    assert any(e == "session_create" and run_id.partition(":")[0] in text for e, text in every)
    assert any(e == "training_run_create" and run_id in text for e, text in every)
    assert any(e == "checkpoint_create" and run_id in text for e, text in every)
    assert any(e == "session_move" for e, _ in events("projects"))
    assert {e.partition("_")[0] for e, _ in events("checkpoints")} == {"checkpoint"}
    assert events("teams") == []


def test_the_audit_log_of_another_day_is_empty(admin: tinker.AdminClient) -> None:
    yesterday = datetime.now(UTC).date() - timedelta(days=1)

    assert admin.get_audit_log(day=yesterday).result(BOUND_S).entries == []


@pytest.mark.parametrize("query", ["event_type=nonsense", "day=nonsense"])
def test_an_audit_log_that_cannot_be_is_refused(tiny_server: LocalServer, query: str) -> None:
    with _http(tiny_server, tiny_server.api_key) as http:
        answer = http.get(f"/audit?{query}")

    assert answer.status_code == 400
    assert "nonsense" in answer.json()["detail"]


def test_the_bill_counts_checkpoints_of_a_session_and_knows_its_metadata(
    admin: tinker.AdminClient, training: tinker.TrainingClient
) -> None:
    start = _this_hour()

    bill = admin.get_billing_usage(start, start + timedelta(hours=2)).result(BOUND_S)

    session_id = training.holder.get_session_id()
    [row] = [
        row
        for row in bill.data
        if row.session_id == session_id and isinstance(row.event_info, types.CheckpointBillingEvent)
    ]
    assert (row.base_model, row.project_id, row.event_info.count) == (TINY, "bill", 1)
    assert row.bucket_end - row.bucket_start == timedelta(hours=1)
    assert bill.sessions[session_id].user_metadata == {"who": "pays"}


@pytest.mark.parametrize(
    ("start", "hours", "said"),
    [
        (timedelta(minutes=-30), 1, "not on the hour"),
        (timedelta(hours=2), 1, "Begin in the past"),
        (timedelta(hours=-1), 0, "end later"),
        (timedelta(days=-15), 14 * 24 + 1, "at most 14 days"),
    ],
)
def test_a_window_that_cannot_be_billed_is_refused(
    admin: tinker.AdminClient, start: timedelta, hours: int, said: str
) -> None:
    begin = _this_hour() + start

    with pytest.raises(tinker.BadRequestError, match=said):
        admin.get_billing_usage(begin, begin + timedelta(hours=hours)).result(BOUND_S)


def test_stored_bytes_are_those_of_the_checkpoints_of_a_project(
    admin: tinker.AdminClient, rest_client: tinker.RestClient, training: tinker.TrainingClient
) -> None:
    rest_client.assign_session_project(training.holder.get_session_id(), "stored").result(BOUND_S)
    [saved] = rest_client.list_checkpoints(training.model_id).result(BOUND_S).checkpoints

    usage = admin.get_current_checkpoint_storage_usage("stored").result(BOUND_S)

    [row] = usage.data
    assert (row.project_id, row.checkpoint_count) == ("stored", 1)
    assert row.size_bytes == saved.size_bytes
    assert row.size_gigabytes == pytest.approx(row.size_bytes / 1e9)
    assert row.estimated_monthly_cost_usd == usage.effective_rate_usd_per_gigabyte_month == 0.0
    everything = admin.get_current_checkpoint_storage_usage().result(BOUND_S)
    assert sum(row.checkpoint_count for row in everything.data) >= 1
