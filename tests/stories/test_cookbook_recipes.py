"""The cookbook's training programs, unmodified, against a server: they learn what they should.

With SmolLM2 and more steps: `python -m tests.benchmarks.cookbook`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from cookbook_recipes import Finished, Plan, run_recipe
from servers import LocalServer
from tiny_data import END, TINY, tokens_of

BOUND_S = 30.0
RECIPE_BOUND_S = 120.0  # 10 s on a quiet machine, half of it importing the cookbook


def _run(server: LocalServer, folder: Path, recipe: str, **settings: Any) -> Finished:
    plan = Plan(
        recipe, TINY, str(folder / "run"), **{"max_tokens": 256, "learning_rate": 1e-2, **settings}
    )
    return run_recipe(plan, server.env, RECIPE_BOUND_S)


def _learn_by_heart(
    service_client: tinker.ServiceClient, tokens: Sequence[int], steps: int
) -> tinker.TrainingClient:
    """Train a client for so many steps on `tokens` alone, without any prompt."""
    client = service_client.create_lora_training_client(TINY, rank=8, seed=0).result(BOUND_S)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={
            "target_tokens": list(tokens[1:]),
            "weights": [1 / (len(tokens) - 1)] * (len(tokens) - 1),
        },
    )
    for _ in range(steps):
        client.forward_backward([datum], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result(BOUND_S)
    return client


def _assert_checkpoints_listed(rest_client: tinker.RestClient, finished: Finished) -> None:
    """All that the recipe says it saved is there, the last of it for good."""
    listed = {
        checkpoint.tinker_path: checkpoint
        for checkpoint in rest_client.list_user_checkpoints(limit=1000).result(BOUND_S).checkpoints
    }
    *_, final = finished.checkpoints
    said = {line[kind] for line in finished.checkpoints for kind in ("state_path", "sampler_path")}
    assert said <= set(listed)
    assert final["name"] == "final"
    assert listed[final["sampler_path"]].expires_at is None
    assert len(finished.checkpoints) > 1
    assert listed[finished.checkpoints[0]["state_path"]].expires_at is not None


def test_supervised_train_learns_the_conversations_that_the_cookbook_ships(
    tiny_server: LocalServer, rest_client: tinker.RestClient, tmp_path: Path
) -> None:
    finished = _run(tiny_server, tmp_path, "sft", steps=10, batch_size=8, learning_rate=4e-3)

    assert [step["step"] for step in finished.steps] == list(range(10))
    seen, held_out = finished.series("train_mean_nll"), finished.series("test/nll")
    assert math.isclose(seen[0], math.log(259), abs_tol=0.05)  # the model is random
    assert seen[-1] < 4.5
    assert held_out[0] > 5.4
    assert held_out[-1] < 4.5
    _assert_checkpoints_listed(rest_client, finished)


@pytest.fixture(scope="module")
def sometimes_stops(service_client: tinker.ServiceClient) -> str:
    """State of a model that ends about half of its answers within 4 tokens.

    RL can see that habit, which a random model has once in 65 answers, and strengthen it.
    """
    client = _learn_by_heart(service_client, [ord("9"), END] * 16, steps=4)
    return client.save_state("sometimes-stops").result(BOUND_S).path


def test_rl_train_earns_more_with_each_step(
    tiny_server: LocalServer, rest_client: tinker.RestClient, sometimes_stops: str, tmp_path: Path
) -> None:
    finished = _run(
        *(tiny_server, tmp_path, "rl"),
        # No more: once all answers end there is no gradient, but Adam's momentum goes on and the
        # policy may fall back.
        **{"steps": 4, "batch_size": 4, "group_size": 16, "max_tokens": 4},
        start=sometimes_stops,
    )

    assert [step["step"] for step in finished.steps] == [0, 1, 2, 3]
    rewards = finished.series("env/all/reward/total")
    # -0.1 for an answer that does not end, 0 for one that does
    assert rewards[-1] > rewards[0] + 0.02
    divergences = finished.series("optim/kl_sample_train_v2")
    assert len(divergences) == 4
    assert max(divergences) < 1e-6  # float32, and the sampler has the weights of this step
    _assert_checkpoints_listed(rest_client, finished)


def test_rl_train_learns_from_answers_sampled_while_it_trained(
    tiny_server: LocalServer, rest_client: tinker.RestClient, sometimes_stops: str, tmp_path: Path
) -> None:
    finished = _run(
        *(tiny_server, tmp_path, "rl-async"),
        **{"steps": 5, "batch_size": 4, "group_size": 16, "max_tokens": 4},
        start=sometimes_stops,
        # In 5 steps no group can be later than 4: it discards none, and each step is done.
        max_steps_off_policy=4,
    )

    assert [step["step"] for step in finished.steps] == [0, 1, 2, 3, 4]
    lags = [
        step["training_client/step"] - step["sampling_client/step_min"] for step in finished.steps
    ]
    assert lags[0] == 0
    assert max(lags) >= 1
    divergences = finished.series("optim/kl_sample_train_v2")
    assert divergences[0] < 1e-6
    assert max(divergences) > 1e-3  # the weights moved on meanwhile, and the logprobs tell
    rewards = finished.series("env/all/reward/total")
    assert rewards[-1] > rewards[0] + 0.02
    _assert_checkpoints_listed(rest_client, finished)


def test_train_dpo_comes_to_prefer_the_chosen_answers(
    tiny_server: LocalServer, rest_client: tinker.RestClient, tmp_path: Path
) -> None:
    finished = _run(tiny_server, tmp_path, "dpo", steps=8, batch_size=8, learning_rate=5e-3)

    losses = finished.series("dpo_loss")
    # Policy and reference are the same: the sampler's logprobs are those of the forward pass.
    assert math.isclose(losses[0], math.log(2), abs_tol=1e-4)
    assert sorted(losses, reverse=True) == losses
    assert finished.series("margin")[-1] > 1
    assert finished.series("accuracy")[-1] == 1
    _assert_checkpoints_listed(rest_client, finished)


def test_train_on_policy_draws_the_student_to_its_teacher(
    tiny_server: LocalServer,
    service_client: tinker.ServiceClient,
    rest_client: tinker.RestClient,
    tmp_path: Path,
) -> None:
    knows_a = _learn_by_heart(service_client, tokens_of("a" * 32), steps=6)
    teacher = knows_a.save_weights_for_sampler("teacher").result(BOUND_S).path
    knows_a_and_b = _learn_by_heart(service_client, tokens_of("ab" * 16), steps=6)
    student = knows_a_and_b.save_state("student").result(BOUND_S).path

    finished = _run(
        *(tiny_server, tmp_path, "distill"),
        **{"steps": 10, "batch_size": 4, "group_size": 8, "max_tokens": 8},
        learning_rate=4e-3,
        start=student,
        teacher=teacher,
    )

    divergences = finished.series("teacher_kl")
    assert len(divergences) == 10
    assert divergences[0] > 2  # half of what the student says, its teacher never would
    assert divergences[-1] < divergences[0] / 4
    assert max(finished.series("optim/kl_sample_train_v2")) < 1e-6
    _assert_checkpoints_listed(rest_client, finished)
