"""Run a program as on a kernel, or in a container, that refuses some system calls.

`python lesser_kernel.py unshare,landlock_restrict_self script.py ...`: the refusal is the real
kernel's, by a filter of seccomp, and everything that is started from here inherits it.
"""

from __future__ import annotations

import runpy
import sys

from tinker_mcp.training.rewards.inside import kernel, seccomp

NUMBERS = {**kernel.NUMBERS, **seccomp._DENIED}


def refuse(names: list[str]) -> None:
    kernel.no_new_privileges()
    denied = {name: NUMBERS[name] for name in names}
    seccomp._install(
        [*seccomp._start(), *seccomp._denials(denied, 1), seccomp._returns(0x7FFF0000)]
    )


if __name__ == "__main__":
    refuse(sys.argv[1].split(","))
    sys.argv[:] = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
