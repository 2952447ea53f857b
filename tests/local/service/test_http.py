"""What the server answers to requests that the SDK would not send, and to strangers."""

from __future__ import annotations

import base64

import httpx
import pytest
import zstandard

from tinker_local.service.identity import Identity
from tiny_data import TINY

KEY = "tml-local-test"  # the one that conftest serves with


CAPABILITIES = "/get_server_capabilities"


async def test_the_key_opens(http: httpx.AsyncClient) -> None:
    answer = await http.get(CAPABILITIES)

    assert answer.status_code == 200
    assert answer.json()["supported_models"][0]["model_name"] == TINY


@pytest.mark.parametrize("key", ["", "tml-local-wrong", "tml-local-tes", f"{KEY}x"])
async def test_a_missing_or_wrong_key_is_refused(http: httpx.AsyncClient, key: str) -> None:
    answer = await http.get(CAPABILITIES, headers={"X-API-Key": key})

    assert answer.status_code == 401
    assert "tinker-local env" in answer.json()["detail"]


@pytest.mark.parametrize(
    "host",
    ["evil.com", "127.0.0.1.evil.com", "127.0.0.1@evil.com", "0.0.0.0", ""],  # noqa: S104
)
async def test_another_host_name_is_refused_although_the_key_is_right(
    http: httpx.AsyncClient, host: str
) -> None:
    answer = await http.get(CAPABILITIES, headers={"Host": host})

    assert answer.status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "localhost:99", "[::1]:8000"])
async def test_loopback_names_are_answered(http: httpx.AsyncClient, host: str) -> None:
    assert (await http.get(CAPABILITIES, headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.com", "null", "http://localhost.evil.com"])
async def test_another_web_page_is_refused_although_the_key_is_right(
    http: httpx.AsyncClient, origin: str
) -> None:
    answer = await http.get(CAPABILITIES, headers={"Origin": origin})

    assert answer.status_code == 403


async def test_a_local_web_page_is_answered(http: httpx.AsyncClient) -> None:
    answer = await http.get(CAPABILITIES, headers={"Origin": "http://localhost:3000"})

    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/api/v1/healthz"])
async def test_health_needs_no_key_but_a_loopback_name(http: httpx.AsyncClient, path: str) -> None:
    url = f"http://127.0.0.1:8000{path}"

    assert (await http.get(url, headers={"X-API-Key": ""})).json() == {"status": "ok"}
    assert (await http.get(url, headers={"Host": "evil.com"})).status_code == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nonsense"), ("PUT", "/checkpoints")],
)
async def test_an_unserved_route_is_named(http: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await http.request(method, path)

    assert answer.status_code == 404
    assert f"does not serve {method} /api/v1{path}" in answer.json()["detail"]


@pytest.mark.parametrize("version", ["0.37.9", "0.9", "", "nonsense"])
async def test_an_sdk_of_an_older_protocol_is_refused(
    http: httpx.AsyncClient, version: str
) -> None:
    answer = await http.post("/client/config", json={"sdk_version": version})

    assert answer.status_code == 400
    assert "Install tinker>=0.38,<0.39" in answer.json()["detail"]


@pytest.mark.parametrize("version", ["0.38.0", "0.38.5", "0.39.0", "1.0.0"])
async def test_an_sdk_of_this_protocol_or_a_later_one_is_served(
    http: httpx.AsyncClient, version: str
) -> None:
    assert (await http.post("/client/config", json={"sdk_version": version})).status_code == 200


@pytest.mark.parametrize(
    "path", ["/client/config", "/cancel_future", "/weights_info", "/create_session", "/asample"]
)
@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b"\xff"])
async def test_a_body_that_is_no_json_object_is_refused(
    http: httpx.AsyncClient, path: str, body: bytes
) -> None:
    answer = await http.post(path, content=body)

    assert answer.status_code == 400
    assert "detail" in answer.json()


async def test_a_body_that_lacks_a_field_names_it(http: httpx.AsyncClient) -> None:
    answer = await http.post("/retrieve_future", json={})

    assert answer.status_code == 400
    assert "request_id" in answer.json()["detail"]


async def test_a_compressed_body_may_not_unpack_to_more_than_64_mib(
    http: httpx.AsyncClient,
) -> None:
    body = zstandard.compress(bytes(65 * 2**20))  # 2 kB

    answer = await http.post(
        "/forward_backward", content=body, headers={"Content-Encoding": "zstd"}
    )

    assert answer.status_code == 400
    assert "unpacks to over 64 MiB" in answer.json()["detail"]


@pytest.mark.parametrize("encoding", ["zstd", "identity"])
async def test_a_body_that_is_no_protobuf_is_refused(
    http: httpx.AsyncClient, encoding: str
) -> None:
    answer = await http.post(
        "/forward_backward", content=b"\xff" * 9, headers={"Content-Encoding": encoding}
    )

    assert answer.status_code == 400


async def test_a_lost_request_is_a_failure_that_says_what_to_do(http: httpx.AsyncClient) -> None:
    answer = await http.post(
        "/retrieve_future", json={"request_id": "lost", "allow_metadata_only": True}
    )

    assert answer.status_code == 200
    assert answer.json()["category"] == "user"
    assert "Make new clients from the last saved state" in answer.json()["error"]


async def test_cancelling_an_unknown_request_is_no_error(http: httpx.AsyncClient) -> None:
    assert (await http.post("/cancel_future", json={"request_id": "lost"})).status_code == 204


async def test_a_token_made_from_the_key_opens(http: httpx.AsyncClient) -> None:
    token = (await http.post("/auth/token", json={})).json()["jwt"]

    answer = await http.get(CAPABILITIES, headers={"X-API-Key": token})

    assert answer.status_code == 200


async def test_an_expired_token_asks_the_sdk_for_a_new_one(http: httpx.AsyncClient) -> None:
    token = Identity(KEY).token(made_from=KEY, life_s=-1)

    answer = await http.get(CAPABILITIES, headers={"X-API-Key": token})

    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


async def test_a_token_of_another_server_is_refused_for_good(http: httpx.AsyncClient) -> None:
    token = Identity("tml-local-other").token(made_from="tml-local-other")

    answer = await http.get(CAPABILITIES, headers={"X-API-Key": token})

    assert answer.status_code == 401
    assert "WWW-Authenticate" not in answer.headers
    assert "made anew from their last saved state" in answer.json()["detail"]


async def test_a_token_with_other_claims_or_another_signature_is_refused(
    http: httpx.AsyncClient,
) -> None:
    header, claims, signature = Identity(KEY).token(made_from=KEY).split(".")
    later = base64.urlsafe_b64encode(b'{"exp": 99999999999}').rstrip(b"=").decode()
    flipped = ("A" if signature[0] != "A" else "B") + signature[1:]

    for forged in (
        f"{header}.{later}.{signature}",
        f"{header}.{claims}.{flipped}",
        f"{header}.{claims}.",
        f"{header}.{claims}",
        "..",
        "\u00e9.\u00e9.\u00e9",
    ):
        answer = await http.get(CAPABILITIES, headers={"X-API-Key": forged.encode()})
        assert answer.status_code == 401, forged


async def test_a_heartbeat_of_a_finished_session_ends_the_heartbeats(
    http: httpx.AsyncClient,
) -> None:
    made = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
    session_id = (await http.post("/create_session", json=made)).json().get("session_id")
    beat = {"session_id": session_id, "type": "session_heartbeat"}
    assert (await http.post("/session_heartbeat", json=beat)).status_code == 200

    for _ in range(2):  # the SDK sends it again when the answer is lost
        finished = await http.post(f"/sessions/{session_id}/finish", json={"reason": {}})
        assert finished.status_code == 204

    assert (await http.post("/session_heartbeat", json=beat)).status_code == 410


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "offset=-1"])
async def test_a_page_that_cannot_be_is_refused(http: httpx.AsyncClient, query: str) -> None:
    answer = await http.get(f"/checkpoints?{query}")

    assert answer.status_code == 400
    assert "limit" in answer.json()["detail"]


async def test_a_session_cannot_finish_for_an_unknown_reason(http: httpx.AsyncClient) -> None:
    answer = await http.post("/sessions/x/finish", json={"reason": {"type": "nonsense"}})

    assert answer.status_code == 400
    assert "success, errored, interrupted" in answer.json()["detail"]


async def test_finishing_an_unknown_session_is_not_found(http: httpx.AsyncClient) -> None:
    assert (await http.post("/sessions/lost/finish", json={})).status_code == 404
