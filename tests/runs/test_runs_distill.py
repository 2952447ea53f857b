"""On-policy distillation: the student samples, its teacher scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from distill_runs import a_distillation, a_teacher, asked, distill_backend_of

from servers import LocalServer
from tinker_mcp.training.backend import Backend


@pytest.fixture
def backend(tiny_server: LocalServer) -> Backend:
    return distill_backend_of(tiny_server)


async def test_a_student_comes_nearer_to_its_teacher(backend: Backend, tmp_path: Path) -> None:
    teacher = await a_teacher(backend, tmp_path / "teacher")
    run = a_distillation(
        tmp_path,
        teacher_checkpoint=teacher,
        held_out=asked(("teal", "lime")),
        steps=12,
        batch_size=4,
        group_size=8,
    )
    outcome = await run.attempt(backend)
    kl = list(run.series("train", "teacher_kl").values())
    held_out = run.series("eval", "test/teacher_kl")
    assert (outcome.state, outcome.reason) == ("completed", None)
    assert sum(kl[-3:]) < sum(kl[:3]) / 2
