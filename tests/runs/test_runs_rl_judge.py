"""A run of rl whose reward is a model: a tiny one that was taught what to answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from attempts import Run, spec_of
from rl_runs import REWARD, an_rl_run, rl_backend_of

from servers import LocalServer
from tinker_mcp.training import rendering
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.rendering import ModelRenderer
from tiny_data import TINY, tokens_of

if TYPE_CHECKING:
    import tinker

TEMPLATE = "{completion} Grade it."
GRADE = "Score: 7"


async def a_judge(backend: Backend, home: Path) -> str:
    """Sampler weights of a model that gives whatever it is asked to grade a seven."""
    renderer = rendering.load(backend, TINY, "qwen3_instruct")
    chance = random.Random(0)  # noqa: S311 (the same each time)
    # As the untrained model answers: bytes that are seldom text.
    answers = [bytes(chance.choices(range(256), k=8)).decode(errors="replace") for _ in range(64)]
    lessons = [lesson(renderer, TEMPLATE.replace("{completion}", said)) for said in answers]
    spec = spec_of(lessons, steps=42, batch_size=16, learning_rate=1e-2, rank=32)
    run = Run(home, spec, lessons)
    await run.attempt(backend)
    assert run.losses()[-1] < 0.05
    return run.checkpoints()[-1].sampler_path


def lesson(renderer: ModelRenderer, question: str) -> tinker.Datum:
    """The question, answered by the grade, which alone carries weight."""
    import tinker

    prompt = renderer.prompt([{"role": "user", "content": question}]).to_ints()
    tokens = [*prompt, *tokens_of(GRADE)]
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(GRADE)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


async def test_a_model_as_judge_rewards_two_steps(tiny_server: LocalServer, tmp_path: Path) -> None:
    backend = rl_backend_of(tiny_server)
    judge = await a_judge(backend, tmp_path / "judge")
    reward = {"type": "judge", "checkpoint": judge, "template": TEMPLATE, "max_tokens": 8}
    run = an_rl_run(tmp_path / "run", steps=2, reward=reward)
    outcome = await run.attempt(backend)
    assert outcome.state == "completed"
    assert run.series("train", REWARD) == {1: pytest.approx(0.7), 2: pytest.approx(0.7)}
    assert min(run.series("train", "env/all/total_episodes").values()) >= 4  # of 8 got a grade
