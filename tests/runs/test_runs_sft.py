"""Supervised fine-tuning as a run: what a step is, what is recorded when, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from attempts import RUN_ID, Run, backend_of, held_out_sentences, sentences, spec_of

from servers import LocalServer
from tinker_mcp.runs.attempt import positions
from tinker_mcp.runs.spec import LrSchedule
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.datums import weight_sum
from tinker_mcp.training.loop import batch_of
from tiny_data import TINY

if TYPE_CHECKING:
    import tinker

ANSWER_S = 30.0


@pytest.fixture
def backend(tiny_server: LocalServer) -> Backend:
    return backend_of(tiny_server)


def a_run(home: Path, **changes: Any) -> Run:
    train, held_out = sentences(), held_out_sentences()
    return Run(home, spec_of(train, held_out, **changes), train, held_out)


def plain_losses(
    service: tinker.ServiceClient,
    train: list[tinker.Datum],
    held_out: list[tinker.Datum],
    rates: Sequence[float],
) -> tuple[list[float], list[float]]:
    """Losses of a loop on the SDK that waits for every answer, and held-out ones at each step."""
    import tinker

    client = service.create_lora_training_client(TINY, rank=4, seed=0).result(ANSWER_S)

    def held_out_loss() -> float:
        output = client.forward(held_out, "cross_entropy").result(ANSWER_S)
        return output.metrics["loss:sum"] / weight_sum(held_out)

    losses, evaluations = [], [held_out_loss()]
    for step, rate in enumerate(rates):
        batch = batch_of(train, 2, step, 0)
        output = client.forward_backward(batch, "cross_entropy").result(ANSWER_S)
        client.optim_step(tinker.AdamParams(learning_rate=rate)).result(ANSWER_S)
        losses.append(output.metrics["loss:sum"] / weight_sum(batch))
        evaluations.append(held_out_loss())
    return losses, evaluations


async def test_its_losses_are_those_of_a_loop_that_waits_for_every_answer(
    backend: Backend, service_client: tinker.ServiceClient, tmp_path: Path
) -> None:
    run = a_run(tmp_path, eval_every=1, save_every=2)
    outcome = await run.attempt(backend)
    losses, evaluations = plain_losses(
        service_client, sentences(), held_out_sentences(), [1e-2] * 6
    )
    assert (outcome.state, outcome.reason) == ("completed", None)
    assert run.losses() == losses
    assert list(run.series("eval", "test/nll").values()) == evaluations
    assert losses[-1] < losses[0]


async def test_six_steps_equal_three_and_three_after_a_resume(
    backend: Backend, tmp_path: Path
) -> None:
    whole, parts = a_run(tmp_path / "whole"), a_run(tmp_path / "parts", steps=3)
    await whole.attempt(backend)
    await parts.attempt(backend)
    parts.change(steps=6)
    await parts.attempt(backend)
    assert parts.losses() == whole.losses()
    assert parts.series("eval", "test/nll")[6] == whole.series("eval", "test/nll")[6]
    assert list(parts.series("train", "train_mean_nll")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.01, 0.01, 0.01, 0.01]),
        ("linear", [0.01, 0.0075, 0.005, 0.0025]),
        ("cosine", [0.01, 0.008535534, 0.005, 0.001464466]),
    ],
)
async def test_the_rate_follows_its_schedule(
    backend: Backend,
    service_client: tinker.ServiceClient,
    tmp_path: Path,
    schedule: LrSchedule,
    rates: list[float],
) -> None:
    run = a_run(tmp_path, steps=4, lr_schedule=schedule)
    await run.attempt(backend)
    recorded = list(run.series("train", "learning_rate").values())
    assert recorded == pytest.approx(rates)
    losses, _ = plain_losses(service_client, sentences(), held_out_sentences(), recorded)
    assert run.losses() == losses


async def test_the_held_out_set_is_scored_before_every_so_many_steps_and_at_the_end(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=5, eval_every=2)
    await run.attempt(backend)
    assert list(run.series("eval", "test/nll")) == [0, 2, 4, 5]


async def test_a_step_is_recorded_with_what_the_cookbook_would_tell_of_it(
    backend: Backend, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=2)
    await run.attempt(backend)
    first = batch_of(run.train, 2, 0, 0)
    assert run.series("train", "num_sequences") == {1: 2, 2: 2}
    assert run.series("train", "num_tokens")[1] == positions(first)
    assert run.series("train", "num_loss_tokens")[1] == positions(first)  # all are trained
    assert run.series("train", "progress") == {1: 0.5, 2: 1.0}
    assert all(seconds > 0 for seconds in run.series("train", "time/total").values())


async def test_checkpoints_are_pairs_named_by_run_and_step_and_the_last_stays(
    backend: Backend, rest_client: tinker.RestClient, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=5, save_every=2, ttl_s=7200)
    await run.attempt(backend)
    rows = run.checkpoints()
    assert [(row.step, row.is_final) for row in rows] == [(2, False), (4, False), (5, True)]
    for row in rows:
        name = f"{RUN_ID}-{row.step:06d}"
        assert row.state_path.endswith(f"/weights/{name}")
        assert row.sampler_path.endswith(f"/sampler_weights/{name}")
    model = rows[0].state_path.removeprefix("tinker://").split("/")[0]
    listed = rest_client.list_checkpoints(model).result(ANSWER_S).checkpoints
    expires = {one.tinker_path: one.expires_at is not None for one in listed}
    assert [expires[row.state_path] for row in rows] == [True, True, False]
    assert [expires[row.sampler_path] for row in rows] == [True, True, False]


async def test_the_final_checkpoint_holds_the_weights_of_the_last_evaluation(
    backend: Backend, service_client: tinker.ServiceClient, tmp_path: Path
) -> None:
    run = a_run(tmp_path, steps=3)
    await run.attempt(backend)
    state = run.checkpoints()[-1].state_path
    client = service_client.create_training_client_from_state(state).result(ANSWER_S)
    held_out = held_out_sentences()
    output = client.forward(held_out, "cross_entropy").result(ANSWER_S)
    loss = output.metrics["loss:sum"] / weight_sum(held_out)
    assert run.series("eval", "test/nll")[3] == loss


async def test_a_run_from_a_checkpoint_begins_with_its_weights_and_a_fresh_optimizer(
    backend: Backend, service_client: tinker.ServiceClient, tmp_path: Path
) -> None:
    import tinker

    first = a_run(tmp_path / "first", steps=3)
    await first.attempt(backend)
    state = first.checkpoints()[-1].state_path
    second = a_run(tmp_path / "second", steps=2, checkpoint=state)
    await second.attempt(backend)
    client = service_client.create_training_client_from_state(state).result(ANSWER_S)
    losses = []
    for step in range(2):
        batch = batch_of(sentences(), 2, step, 0)
        output = client.forward_backward(batch, "cross_entropy").result(ANSWER_S)
        client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result(ANSWER_S)
        losses.append(output.metrics["loss:sum"] / weight_sum(batch))
    assert second.losses() == losses


async def test_without_held_out_data_nothing_is_scored(backend: Backend, tmp_path: Path) -> None:
    train = sentences()
    run = Run(tmp_path, spec_of(train, steps=2), train)
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert run.series("eval", "test/nll") == {}
