"""The demo on the default model: a real one, small enough for a CPU."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from demo_process import run_demo


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home of its own; the backend that the demo starts there is ended."""
    yield tmp_path
    note = tmp_path / "local" / "server.json"
    if note.exists():
        process = psutil.Process(json.loads(note.read_text())["pid"])
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def test_the_demo_makes_smollm2_better_on_conversations_it_never_saw(home: Path) -> None:
    began = time.monotonic()
    done = run_demo(home, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert result["has_improved"] is True
    assert result["answer_after"] == result["answer_of_checkpoint"] != result["answer_before"]
    assert time.monotonic() - began < 180
