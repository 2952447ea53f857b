"""The demo on the default model: a real one, small enough for a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


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
    done = subprocess.run(
        [sys.executable, "-m", "tinker_mcp", "demo", "--json"],
        env={**os.environ, "TINKER_MCP_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert result["has_improved"] is True
    assert result["answer_after"] == result["answer_of_checkpoint"] != result["answer_before"]
    assert time.monotonic() - began < 180
