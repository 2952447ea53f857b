"""Counted tokens: added from any thread, kept on disk, asked for by the hour."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from tinker_local.service.usage import UsageLedger

MODEL = "org/base"
HOUR = timedelta(hours=1)


def _today() -> tuple[datetime, datetime]:
    """From the hour before this one to the end of the next."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return hour - HOUR, hour + 2 * HOUR


def _counts(ledger: UsageLedger) -> dict[tuple[str, str, str | None], int]:
    return {(u.kind, u.base_model, u.session_id): u.tokens for u in ledger.between(*_today())}


def test_tokens_add_up_by_kind_model_and_session(tmp_path: Path) -> None:
    ledger = UsageLedger(tmp_path)

    for tokens in (3, 4):
        ledger.add("training", MODEL, tokens, "a")
    ledger.add("training", MODEL, 5, "b")
    ledger.add("sampling_sample", "org/other", 6)

    assert _counts(ledger) == {
        ("training", MODEL, "a"): 7,
        ("training", MODEL, "b"): 5,
        ("sampling_sample", "org/other", None): 6,
    }


def test_what_was_written_is_counted_on_by_the_next_server(tmp_path: Path) -> None:
    first = UsageLedger(tmp_path)
    first.add("training", MODEL, 3)
    first.flush()
    first.add("training", MODEL, 100)  # lost: it was killed before the next write

    second = UsageLedger(tmp_path)
    second.add("training", MODEL, 4)
    second.flush()

    assert _counts(UsageLedger(tmp_path)) == {("training", MODEL, None): 7}
    assert [file.suffix for file in (tmp_path / "usage").iterdir()] == [".json"]


def test_threads_do_not_lose_each_others_tokens(tmp_path: Path) -> None:
    ledger = UsageLedger(tmp_path)

    def count() -> None:
        for _ in range(500):
            ledger.add("training", MODEL, 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        ledger.flush()
    for thread in threads:
        thread.join()
    ledger.flush()

    assert _counts(UsageLedger(tmp_path)) == {("training", MODEL, None): 2000}


def test_only_the_hours_of_the_window_are_told(tmp_path: Path) -> None:
    ledger = UsageLedger(tmp_path)
    ledger.add("training", MODEL, 1)
    start, end = _today()

    assert ledger.between(start - 24 * HOUR, start) == []
    assert ledger.between(end, end + 24 * HOUR) == []
    assert len(ledger.between(start - 300 * HOUR, end)) == 1


async def test_the_bill_is_what_was_counted_the_largest_first(
    serving: Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]], tmp_path: Path
) -> None:
    start, end = _today()
    window = {"starting_on": start.isoformat(), "ending_before": end.isoformat()}
    async with serving(tmp_path) as http:
        ledger: UsageLedger = http._transport.app.app.state.usage  # type: ignore[attr-defined]
        ledger.add("sampling_sample", MODEL, 1)
        ledger.add("sampling_prefill_cached", MODEL, 3)
        ledger.add("sampling_prefill", MODEL, 2)
        ledger.add("training", MODEL, 4)

    async with serving(tmp_path) as http:  # written when the server before ended
        bill: dict[str, Any] = (await http.get("/billing/usage/events", params=window)).json()

    assert [row["event_info"] for row in bill["data"]] == [
        {"type": "training", "token_count": 4},
        {"type": "sampling_prefill", "token_count": 3, "cached": True},
        {"type": "sampling_prefill", "token_count": 2, "cached": False},
        {"type": "sampling_sample", "token_count": 1},
    ]
    assert {row["estimated_cost_usd"] for row in bill["data"]} == {0.0}
