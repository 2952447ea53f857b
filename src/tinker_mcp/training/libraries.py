"""The heavy libraries of this process: whether they are there, and loading them before they are.

They take three seconds of a processor and 400 MB, so nothing loads them before it is plain that
somebody will train. Where it is, a thread can do so while the agent thinks.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator

from tinker_mcp import garbage

_one_at_a_time = threading.RLock()

_LIBRARIES = (  # in the order in which tools wait for them
    "tinker",
    "transformers.models.auto.tokenization_auto",  # brings torch._dynamo
    "tinker_cookbook.supervised.common",  # brings datasets
)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Where a library may be loaded: one thread at a time, and without garbage collections.

    `from transformers import AutoTokenizer` raised ImportError in a thread while another one was
    loading what it belongs to.
    """
    with _one_at_a_time, garbage.while_importing():
        yield


def are_loaded() -> bool:
    """Whether data can be rendered without loading more."""
    return all(map(_is_loaded, _LIBRARIES))


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    # While a module is imported it is there already; Python itself asks this of its spec.
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def load() -> None:
    """Load them. Blocks for seconds; the event loop of another thread for 0.3 s at a time."""
    for name in _LIBRARIES:
        with loading():
            importlib.import_module(name)
