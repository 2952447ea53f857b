"""Runs scripts one after another in this process: importing torch for each would take seconds.

Each line of stdin is the argv of a script, as JSON; a line of stdout then says how it ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from typing import Any


def ended(argv: list[str]) -> dict[str, Any]:
    """Status, stdout and stderr of a script, as the interpreter would have them."""
    sys.argv, out, err = argv, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                sys.stderr.write(f"{end.code}\n")
        except Exception:
            traceback.print_exc()
            status = 1
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    for line in sys.stdin:
        answers.write(json.dumps(ended(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
