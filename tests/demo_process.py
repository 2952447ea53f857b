"""`tinker-mcp demo` as a process, for the tests of the command and the story on SmolLM2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_demo(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with its state in `home`."""
    return subprocess.run(
        [sys.executable, "-m", "tinker_mcp", "demo", *arguments],
        env={**os.environ, "TINKER_MCP_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
