"""`tinker-local stats` and GET /stats: what the server is doing."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from click.testing import CliRunner
from tinker import types

from servers import LocalServer
from tinker_local.cli import main
from tiny_data import TINY, sdk_datum, tokens_of

BOUND_S = 30.0
TEXT = "the cat sat on the mat"  # 22 tokens, 21 of them model input of a datum
PROMPT = types.ModelInput.from_ints(tokens_of(TEXT))


def _stats(server: LocalServer) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["stats", "--state-dir", str(server.state_dir)])
    assert done.exit_code == 0
    stats: dict[str, Any] = json.loads(done.output)
    return stats


def _train_and_sample(service: tinker.ServiceClient) -> None:
    """Train 2 x 21 tokens; read a prompt of 22 and draw 3 x 5 tokens."""
    client = service.create_lora_training_client(TINY, rank=2, seed=0).result(BOUND_S)
    client.forward_backward([sdk_datum(TEXT), sdk_datum(TEXT)], "cross_entropy").result(BOUND_S)
    sampler = client.save_weights_and_get_sampling_client().result(BOUND_S)
    sampler.sample(PROMPT, 3, types.SamplingParams(max_tokens=5, stop=[])).result(BOUND_S)


def test_the_command_prints_what_the_server_tells(tiny_server: LocalServer) -> None:
    headers = {"X-API-Key": tiny_server.api_key}

    told = httpx.get(f"{tiny_server.base_url}/stats", headers=headers).json()

    assert _stats(tiny_server) == told
    assert told["queued_training_requests"] == {}
    assert told["active_sample_requests"] == 0
    assert (told["cycle_s"], told["cycles"], told["cycles_by_training_client"]) == (None, 0, {})


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "tml-local-wrong"}])
def test_stats_are_told_to_who_has_the_key_alone(
    tiny_server: LocalServer, headers: dict[str, str]
) -> None:
    answer = httpx.get(f"{tiny_server.base_url}/stats", headers=headers)

    assert answer.status_code == 401


def test_stats_without_a_server_say_how_to_start_one(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["stats", "--state-dir", str(tmp_path / "none")])

    assert done.exit_code == 1
    assert "`tinker-local serve`" in done.output


def test_the_tokens_trained_and_sampled_are_counted(
    tiny_server: LocalServer, service_client: tinker.ServiceClient
) -> None:
    before = _stats(tiny_server)["tokens"]

    _train_and_sample(service_client)

    after = _stats(tiny_server)["tokens"]
    assert {kind: after[kind] - before[kind] for kind in after} == {
        "training": 42,
        "sampling_prefill": 22,
        "sampling_prefill_cached": 0,
        "sampling_sample": 15,
    }


def test_a_prompt_that_another_request_has_read_is_counted_as_cached(
    tiny_server: LocalServer, service_client: tinker.ServiceClient
) -> None:
    client = service_client.create_sampling_client(base_model=TINY).result(BOUND_S)
    before = _stats(tiny_server)["tokens"]

    params = types.SamplingParams(max_tokens=2, stop=[])
    asked = [client.sample(PROMPT, 1, params) for _ in range(8)]
    hits = sum(future.result(BOUND_S).prompt_cache_hit_tokens for future in asked)

    after = _stats(tiny_server)["tokens"]
    assert after["sampling_prefill_cached"] - before["sampling_prefill_cached"] == hits
    assert after["sampling_prefill"] - before["sampling_prefill"] == 8 * 22 - hits


def test_the_bill_of_a_session_holds_the_tokens_it_used(tiny_server: LocalServer) -> None:
    admin = tinker.AdminClient(base_url=tiny_server.base_url, api_key=tiny_server.api_key)
    start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    with tinker.ServiceClient(
        base_url=tiny_server.base_url, api_key=tiny_server.api_key
    ) as service:
        _train_and_sample(service)
        session_id = service.holder.get_session_id()

    bill = admin.get_billing_usage(start, start + timedelta(hours=2)).result(BOUND_S)

    mine = [row for row in bill.data if row.session_id == session_id]
    tokens = {
        (row.event_info.type, getattr(row.event_info, "cached", None)): row.event_info.token_count
        for row in mine
        if not isinstance(row.event_info, types.CheckpointBillingEvent)
    }
    assert tokens == {
        ("training", None): 42,
        ("sampling_prefill", False): 22,
        ("sampling_prefill", True): 0,
        ("sampling_sample", None): 15,
    }
    assert {row.estimated_cost_usd for row in mine} == {0.0}
