"""Direct preference optimization as a run: its numbers, its references, its place in the line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from attempts import Run, backend_of, pairs, spec_of
from safetensors.numpy import load_file
from tinker_cookbook.preference.train_dpo import compute_dpo_loss

from servers import LocalServer
from tinker_mcp.runs.attempt import positions
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.loop import batch_of
from tiny_data import TINY

if TYPE_CHECKING:
    import tinker

ANSWER_S = 30.0
METRICS = ("dpo_loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
BETA = 0.1


@pytest.fixture
def backend(tiny_server: LocalServer) -> Backend:
    return backend_of(tiny_server)


def a_run(home: Path, **changes: Any) -> Run:
    train, held_out = pairs(), pairs(("teal", "lime"))
    settings = {"method": "dpo", "beta": BETA, "learning_rate": 3e-3, **changes}
    return Run(home, spec_of(train, held_out, **settings), train, held_out)


def log_likelihoods(
    client: tinker.TrainingClient, datums: list[tinker.Datum]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of the trained tokens: those of the chosen, those of the rejected."""
    output = client.forward(datums, "cross_entropy").result(ANSWER_S)
    sums = [
        (found["logprobs"].to_torch() * datum.loss_fn_inputs["weights"].to_torch()).sum()
        for found, datum in zip(output.loss_fn_outputs, datums, strict=True)
    ]
    return sums[0::2], sums[1::2]


async def test_its_numbers_are_the_cookbooks_on_the_same_log_probabilities(
    backend: Backend, service_client: tinker.ServiceClient, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=2, save_every=1)
    await run.attempt(backend)
    start = service_client.create_lora_training_client(TINY, rank=4, seed=0).result(ANSWER_S)
    state = run.checkpoints()[0].state_path
    after_one = service_client.create_training_client_from_state(state).result(ANSWER_S)
    by_pair = [run.train[at : at + 2] for at in range(0, len(run.train), 2)]
    batch = [datum for pair in batch_of(by_pair, 2, 1, 0) for datum in pair]  # of step 2
    _, expected = compute_dpo_loss(
        *log_likelihoods(after_one, batch), *log_likelihoods(start, batch), BETA
    )
    found = {name: run.series("train", name)[2] for name in METRICS}
    assert found == pytest.approx(expected, abs=1e-6)
    assert found["margin"] != 0


async def test_the_loss_begins_at_ln_2_and_falls_on_both_sets(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=8, eval_every=4)
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert run.losses()[0] == pytest.approx(math.log(2), abs=1e-6)
    held_out = run.series("eval", "test/dpo_loss")
    assert list(held_out) == [0, 4, 8]
    assert held_out[0] == pytest.approx(math.log(2), abs=1e-6)
    assert held_out[8] < held_out[4] < held_out[0]
    assert run.losses()[-1] < 0.5
    assert run.series("eval", "test/accuracy")[8] == 1
    assert run.series("train", "accuracy")[8] == 1


async def test_a_step_of_pairs_counts_both_of_each(backend: Backend, tmp_path: Path) -> None:
    run = a_run(tmp_path, steps=1, batch_size=8)
    await run.attempt(backend)
    assert run.series("train", "num_sequences") == {1: 16}
    assert run.series("train", "num_tokens") == {1: positions(run.train)}


async def test_six_steps_equal_three_and_three_after_a_resume(
    backend: Backend, tmp_path: Path
) -> None:
    whole, parts = a_run(tmp_path / "whole"), a_run(tmp_path / "parts", steps=3)
    await whole.attempt(backend)
    await parts.attempt(backend)
    parts.change(steps=6)
    await parts.attempt(backend)
    assert parts.losses() == whole.losses()
    for name in METRICS:
        evaluations = [run.series("eval", f"test/{name}")[6] for run in (parts, whole)]
        assert evaluations[0] == evaluations[1]


def tokens_served(server: LocalServer) -> int:
    """Training tokens since the server's start."""
    answer = httpx.get(f"{server.base_url}/stats", headers={"X-API-Key": server.api_key})
    return int(answer.raise_for_status().json()["tokens"]["training"])


async def test_the_references_are_computed_once_for_all_attempts(
    backend: Backend, tiny_server: LocalServer, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=1, batch_size=8)
    served = [tokens_served(tiny_server)]
    for steps in (1, 2):
        run.change(steps=steps)
        await run.attempt(backend)
        served.append(tokens_served(tiny_server))
    train, held_out = positions(run.train), positions(run.held_out)
    references, step = train + held_out, 2 * train
    assert served[1] - served[0] == references + step + 2 * held_out
    assert served[2] - served[1] == step + held_out


async def test_a_resume_that_finds_no_references_takes_them_from_the_frozen_start(
    backend: Backend, tmp_path: Path
) -> None:
    whole, parts = a_run(tmp_path / "whole"), a_run(tmp_path / "parts", steps=3)
    await whole.attempt(backend)
    await parts.attempt(backend)
    kept = parts.folder.train_data.with_name("references.safetensors")
    before = load_file(kept)["references"].tolist()
    kept.unlink()
    parts.change(steps=6)
    await parts.attempt(backend)
    assert load_file(kept)["references"].tolist() == before
    assert parts.losses() == whole.losses()


async def test_references_of_other_data_are_not_used(backend: Backend, tmp_path: Path) -> None:
    run, other = a_run(tmp_path / "run", steps=1), a_run(tmp_path / "other", steps=1)
    await other.attempt(backend)
    name = "references.safetensors"
    foreign = other.folder.train_data.with_name(name)
    run.change(train=run.spec.train.model_copy(update={"sha256": "of other data"}))
    run.folder.train_data.with_name(name).write_bytes(foreign.read_bytes())
    await run.attempt(backend)
    assert run.folder.train_data.with_name(name).read_bytes() != foreign.read_bytes()


async def test_what_it_costs_is_two_passes_a_step_one_an_evaluation_and_one_for_the_references(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=2, batch_size=8, usd_per_million=1e6, max_usd=1e9)
    journal = run.journal()
    await run.attempt(backend, journal)
    train, held_out = positions(run.train), positions(run.held_out)
    assert journal.spent_usd == (train + held_out) + 2 * 2 * train + 2 * held_out


async def test_a_cap_that_the_references_would_pass_stops_before_them(
    backend: Backend, tiny_server: LocalServer, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=2, batch_size=8, usd_per_million=1e6)
    references = positions(run.train) + positions(run.held_out)
    run.change(max_usd=references - 1)
    served, journal = tokens_served(tiny_server), run.journal()
    outcome = await run.attempt(backend, journal)
    assert (outcome.state, outcome.reason) == ("stopped", "budget")
    assert f"The pass for the references would cost ${references}" in outcome.detail
    assert (journal.spent_usd, tokens_served(tiny_server)) == (0, served)
    assert run.checkpoints() == []


async def test_the_references_count_where_the_budget_ends_a_run(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=4, batch_size=8, usd_per_million=1e6)
    train, held_out = positions(run.train), positions(run.held_out)
    ahead = train + 2 * held_out  # the references, and the evaluation at step 0
    run.change(max_usd=ahead + 2 * 2 * train + 1)
    journal = run.journal()
    outcome = await run.attempt(backend, journal)
    assert (outcome.reason, [row.step for row in run.checkpoints()]) == ("budget", [2])
    assert journal.spent_usd == ahead + 2 * 2 * train
