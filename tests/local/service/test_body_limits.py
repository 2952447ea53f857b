"""Bodies that are too large: refused, not read into memory, and without a gap in the order."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import httpx
import pytest
import zstandard
from tinker.proto import tinker_public_pb2 as pb

from tinker_local.service.body_limits import JSON_LIMIT_BYTES, LIMITS_BYTES
from tinker_local.service.wire.turns import turn_in_json, turn_in_protobuf

PIECE = bytes(2**20)
FORWARD_BACKWARD_LIMIT = LIMITS_BYTES["/api/v1/forward_backward"]


class _Stream:
    """A body in pieces of 1 MiB, which counts how many were asked for."""

    def __init__(self, head: bytes, pieces: int) -> None:
        self.head, self.pieces, self.sent = head, pieces, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.head
        for _ in range(self.pieces):
            self.sent += 1
            yield PIECE


def _head(seq_id: int) -> bytes:
    request = pb.ForwardBackwardRequest(
        model_id="a:train:0", seq_id=seq_id, loss_fn="cross_entropy"
    )
    return bytes(request.SerializeToString())


@pytest.mark.parametrize("path", ["/create_session", "/optim_step", "/asample"])
async def test_a_json_body_over_the_limit_is_refused(http: httpx.AsyncClient, path: str) -> None:
    limit = LIMITS_BYTES.get(f"/api/v1{path}", JSON_LIMIT_BYTES)

    answer = await http.post(path, content=b" " * (limit + 1))

    assert answer.status_code == 413
    assert answer.json()["detail"].startswith(
        f"The body for /api/v1{path} is larger than {limit // 2**20} MiB."
    )


async def test_a_body_of_exactly_the_limit_is_read(http: httpx.AsyncClient) -> None:
    body = b'{"sdk_version": "0.38.0"}'

    answer = await http.post("/client/config", content=body.ljust(JSON_LIMIT_BYTES))

    assert answer.status_code == 200


async def test_a_body_without_a_declared_length_is_counted(http: httpx.AsyncClient) -> None:
    body = _Stream(b"", 5)

    answer = await http.post("/create_session", content=aiter(body))

    assert answer.status_code == 413
    assert body.sent == 5  # a client that still sends would not read the answer


@pytest.mark.parametrize("declared", [True, False])
async def test_a_forward_backward_over_the_limit_uses_its_number_up(
    http: httpx.AsyncClient, declared: bool
) -> None:
    body = _Stream(_head(1), FORWARD_BACKWARD_LIMIT // 2**20)
    length = {"Content-Length": str(FORWARD_BACKWARD_LIMIT + len(body.head))} if declared else {}

    answer = await http.post("/forward_backward", content=aiter(body), headers=length)

    assert answer.status_code == 200
    assert answer.json() == {"request_id": "a:train:0:1"}


async def test_a_client_is_told_why_its_large_request_failed_and_goes_on(
    http: httpx.AsyncClient,
) -> None:
    opened = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
    session_id = (await http.post("/create_session", json=opened)).json()["session_id"]
    model_id = _open_model(http, session_id)
    body = pb.ForwardBackwardRequest(model_id=model_id, seq_id=1).SerializeToString()

    large = await http.post("/forward_backward", content=body + bytes(FORWARD_BACKWARD_LIMIT))
    after = {"model_id": model_id, "seq_id": 2, "type": "optim_step", "optimizer_params": {}}
    await http.post("/optim_step", json=after)

    failed = await http.post("/retrieve_future", json={"request_id": large.json()["request_id"]})
    assert failed.json()["category"] == "user"
    assert "larger than 64 MiB" in failed.json()["error"]
    answered = await http.post("/retrieve_future", json={"request_id": f"{model_id}:2"})
    assert answered.status_code == 200  # and not 408: nothing holds it back


def _open_model(http: httpx.AsyncClient, session_id: str) -> str:
    from tinker_local.ops import LoraSpec
    from tinker_local.service.scheduler import Sequencer
    from tinker_local.service.sessions import TrainedModel

    transport: httpx.ASGITransport = http._transport  # type: ignore[assignment]
    backend = transport.app.app.state.backend  # type: ignore[attr-defined]
    model_id = f"{session_id}:train:0"
    backend.sessions.get(session_id).models[model_id] = TrainedModel(
        model_id, session_id, "org/base", LoraSpec(), Sequencer(backend.scheduler, model_id)
    )
    return model_id


@pytest.mark.parametrize("seq_id", [1, 127, 128, 2**31 - 1])
@pytest.mark.parametrize("is_compressed", [True, False])
def test_the_turn_of_a_forward_backward_is_read_from_its_first_bytes(
    seq_id: int, is_compressed: bool
) -> None:
    whole = _head(seq_id) + random.Random(seq_id).randbytes(2**20)  # noqa: S311
    head = (zstandard.compress(whole) if is_compressed else whole)[: 256 * 2**10]

    assert turn_in_protobuf(head, is_compressed=is_compressed) == ("a:train:0", seq_id)


@pytest.mark.parametrize("head", [b"", b"\x0a", b"\x0a\x05abc", b"\xff" * 20, b"\x0a\x01\xff\x10"])
def test_bytes_without_a_turn_have_none(head: bytes) -> None:
    assert turn_in_protobuf(head, is_compressed=False) is None
    assert turn_in_protobuf(head, is_compressed=True) is None
    assert turn_in_json(head) is None


def test_the_turn_of_a_json_request_is_read_from_its_first_bytes() -> None:
    head = b'{"model_id": "a:train:0", "path": "x", "seq_id": 12, "user_metadata": {"a": "bb'

    assert turn_in_json(head) == ("a:train:0", 12)
