"""Python's garbage collector, left out where much is made and none of it is garbage."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def while_importing() -> Iterator[None]:
    """For imports: they take a quarter less. What they made stays out of its later rounds too."""
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if len(sys.modules) > modules:
                gc.freeze()
            gc.enable()


@contextlib.contextmanager
def while_building() -> Iterator[None]:
    """For a large collection of objects, which takes a third less."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # Frozen and thawed they are old, at once. Else the next two collections of young
            # objects look at all of them and hold everything up: 5 s for 100,000 conversations.
            gc.freeze()
            gc.unfreeze()
            gc.enable()
