"""The libraries that rendering data needs, loaded ahead of it."""

from __future__ import annotations

import subprocess
import sys

LOOK = """
import json
import sys
from tinker_mcp.training import libraries
before = libraries.are_loaded()
libraries.load()
after, known = libraries.are_loaded(), set(sys.modules)
import tinker_mcp.training.datums, tinker_mcp.training.rendering
from tinker_cookbook.supervised.common import datum_from_model_input_weights
from transformers import AutoTokenizer
slow = ("tinker", "torch", "transformers", "tinker_cookbook", "datasets")
late = sorted(n for n in set(sys.modules) - known if n.split(".")[0] in slow)
print(json.dumps([before, after, late]))
"""


def test_loading_them_ahead_leaves_nothing_slow_for_later() -> None:
    told = subprocess.run(
        [sys.executable, "-c", LOOK], capture_output=True, text=True, check=True, timeout=100
    )
    assert told.stdout.splitlines()[-1] == "[false, true, []]"
