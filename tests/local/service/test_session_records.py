"""What is remembered of sessions, and what becomes of silent ones."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tinker_local.service.endpoints import futures
from tinker_local.service.journal import RecordedSampler, SessionJournal

BOUND_S = 5.0
ID = "00000000-0000-0000-0000-000000000001"
SESSION = {
    "tags": [],
    "user_metadata": {"a": 1},
    "sdk_version": "0.38.0",
    "type": "create_session",
}

Serving = Callable[..., contextlib.AbstractAsyncContextManager[httpx.AsyncClient]]


async def _session(http: httpx.AsyncClient, **more: Any) -> str:
    return str((await http.post("/create_session", json=SESSION | more)).json()["session_id"])


async def _status(http: httpx.AsyncClient, session_id: str) -> Any:
    found = await http.post("/sessions/search", json={"session_id": session_id})
    [session] = found.json()["sessions"]
    return session["status"]


async def _beat(http: httpx.AsyncClient, session_id: str) -> int:
    beat = {"session_id": session_id, "type": "session_heartbeat"}
    return (await http.post("/session_heartbeat", json=beat)).status_code


async def test_a_silent_session_is_finished_and_one_with_a_heartbeat_is_not(
    serving: Serving, tmp_path: Path
) -> None:
    async with serving(tmp_path, lost_after_s=0.5, look_for_lost_s=0.05) as http:
        silent, alive = await _session(http), await _session(http)

        async with asyncio.timeout(BOUND_S):
            while (await _status(http, silent))["type"] == "active":
                assert await _beat(http, alive) == 200
                await asyncio.sleep(0.02)

        ended = await _status(http, silent)
        assert (ended["reason"], ended["detail"]) == (
            {"type": "interrupted"},
            "Its client went silent.",
        )
        assert await _status(http, alive) == {"type": "active"}
        assert await _beat(http, silent) == 410


async def test_a_request_that_takes_longer_than_a_poll_is_asked_for_again(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(futures, "LONG_POLL_S", 0.05)
    store = http._transport.app.app.state.backend.futures  # type: ignore[attr-defined]
    store.create("slow", "session")

    answer = await http.post("/retrieve_future", json={"request_id": "slow"})

    assert answer.status_code == 408
    told = answer.json()
    assert (told["type"], told["request_id"], told["queue_state"]) == (
        "try_again",
        "slow",
        "active",
    )


async def test_sessions_of_earlier_servers_are_listed_as_what_they_were(
    serving: Serving, tmp_path: Path
) -> None:
    async with serving(tmp_path) as http:
        finished, lost = await _session(http), await _session(http, display_name="lost")
        await http.post(f"/sessions/{finished}/finish", json={"reason": {"type": "errored"}})

    async with serving(tmp_path) as http:
        listed = (await http.get("/sessions")).json()["sessions"]
        assert listed == [lost, finished]
        assert (await _status(http, finished))["reason"] == {"type": "errored"}
        assert await _status(http, lost) is None
        told = (await http.get(f"/sessions/{lost}")).json()
        assert (told["display_name"], told["user_metadata"]) == ("lost", {"a": "1"})
        assert await _beat(http, lost) == 410
        again = await http.post(f"/sessions/{lost}/finish", json={})
        assert again.status_code == 404
        assert "was lost when this server was restarted" in again.json()["detail"]


async def test_the_first_reason_to_finish_stays(http: httpx.AsyncClient) -> None:
    session_id = await _session(http)

    for reason in ("errored", "success"):
        await http.post(f"/sessions/{session_id}/finish", json={"reason": {"type": reason}})

    assert (await _status(http, session_id))["reason"] == {"type": "errored"}


async def test_what_never_was_is_told_apart_from_what_was_lost(http: httpx.AsyncClient) -> None:
    session_id = await _session(http)

    for model_id, said in (
        (f"{session_id}:train:9", "No training client"),
        ("nonsense:train:0", "There never was a session 'nonsense'"),
        ("../../etc:train:0", "There never was a session '../../etc'"),
    ):
        answer = await http.post("/get_info", json={"model_id": model_id, "type": "get_info"})
        assert answer.status_code == 404
        assert said in answer.json()["detail"]


def test_a_line_that_was_cut_off_by_a_kill_costs_itself_alone(tmp_path: Path) -> None:
    journal = SessionJournal(tmp_path)
    journal.open(ID, {"a": "b"}, "name", "project")
    journal.add_model(ID, f"{ID}:train:0")
    with (tmp_path / "sessions" / f"{ID}.jsonl").open("a") as file:
        file.write('\n{"model": "half')

    journal = SessionJournal(tmp_path)
    journal.add_sampler(ID, f"{ID}:sample:0", RecordedSampler("org/base", None))

    record = SessionJournal(tmp_path).get(ID)
    assert record is not None
    assert (record.user_metadata, record.display_name, record.project_id) == (
        {"a": "b"},
        "name",
        "project",
    )
    assert record.model_ids == [f"{ID}:train:0"]
    assert record.samplers == {f"{ID}:sample:0": RecordedSampler("org/base", None)}


@pytest.mark.parametrize("content", ["", "\n", '\n{"opened_at": "2026', '\n{"model": "x"}', "\n[]"])
def test_a_file_without_its_first_line_is_no_session(tmp_path: Path, content: str) -> None:
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / f"{ID}.jsonl").write_text(content)

    assert SessionJournal(tmp_path).all() == []


def test_a_heartbeat_is_remembered_without_a_line(tmp_path: Path) -> None:
    journal = SessionJournal(tmp_path)
    journal.open(ID, {}, None, None)
    file = tmp_path / "sessions" / f"{ID}.jsonl"
    size = file.stat().st_size

    journal.see(ID)

    assert file.stat().st_size == size
    again = SessionJournal(tmp_path).get(ID)
    assert again is not None
    assert again.seen_at > again.created_at
