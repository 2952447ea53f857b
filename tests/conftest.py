"""Servers and clients shared by the tests, and a look at what they leave behind."""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from servers import LocalServer, start_server

if TYPE_CHECKING:
    import tinker

# Before the SDK or huggingface_hub is imported: both read these once.
os.environ.update(HF_HUB_OFFLINE="1", TINKER_TELEMETRY="0", TOKENIZERS_PARALLELISM="false")
# Before torch is: the tiny model gains nothing from a second thread, and on a busy machine two
# that wait for each other are ten times as slow as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Servers and workers begin with compiled modules, as installed ones do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
for _name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
    os.environ.pop(_name, None)

_OURS = ("tinker_local", "tinker_mcp", "tinker-local", "tinker-mcp")


# Until all tests are collected: what they import is no garbage, and looking takes half the time.
gc.disable()


def pytest_collection_finish() -> None:
    """Have the collector look only at what the tests make."""
    gc.freeze()
    gc.enable()


def pytest_xdist_auto_num_workers() -> int | None:
    """`-n auto`: half as many again as there are cores; many tests wait for what they started."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # as xdist itself reads it
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return max(2, 3 * cores // 2)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let the SDK end with its connections open, which closing its clients does not change.

    They belong to its process-wide event loop thread, a daemon (SDK 0.38,
    lib/internal_client_holder.py); those to loopback alone are excused.
    """
    for message in (
        r"unclosed <socket\.socket .*raddr=\('127\.0\.0\.1'",
        r"unclosed transport <_SelectorSocketTransport",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:ResourceWarning")
        # pytest's last look, after all tests, goes by the filters it has set by now.
        warnings.filterwarnings("ignore", message, ResourceWarning)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """When all is done, no server or worker of this session may be alive."""
    yield
    left = _our_processes(tmp_path_factory.getbasetemp())
    _, alive = psutil.wait_procs(left, timeout=5)
    commands = [process.cmdline() for process in alive]
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
    assert commands == []


@pytest.fixture(scope="session", autouse=True)
def the_sdk_draws_for_itself() -> Iterator[None]:
    """Give the SDK's threads a random generator of their own for their jitter.

    hypothesis refuses a test during which anything in the process draws from Python's own, and a
    client's heartbeat goes on in its daemon thread long after the test that opened it.
    """
    from tinker import _base_client
    from tinker.lib import _jwt_auth, retry_handler

    own = random.Random(0)  # noqa: S311
    drawing = pytest.MonkeyPatch()
    drawing.setattr(_base_client, "random", own.random)
    drawing.setattr(_jwt_auth, "random", own)
    drawing.setattr(retry_handler, "random", own)
    yield
    drawing.undo()


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """One server of the tiny model, for all tests that leave it alive."""
    server = start_server(tmp_path_factory.mktemp("tiny-server") / "state")
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[LocalServer]:
    """A server that the test may kill."""
    server = start_server(tmp_path / "state")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def service_client(tiny_server: LocalServer) -> Iterator[tinker.ServiceClient]:
    """The real SDK's client of `tiny_server`."""
    import tinker

    with tinker.ServiceClient(base_url=tiny_server.base_url, api_key=tiny_server.api_key) as client:
        yield client


@pytest.fixture(scope="session")
def rest_client(tiny_server: LocalServer) -> tinker.RestClient:
    """The real SDK's REST client of `tiny_server`; the SDK keeps its connections until it ends."""
    import tinker

    return tinker.RestClient(base_url=tiny_server.base_url, api_key=tiny_server.api_key)


def _our_processes(basetemp: Path) -> list[psutil.Process]:
    """Servers and workers below this process, and those that work inside `basetemp`."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:  # gone meanwhile, or another user's
            continue
        is_ours = process.pid in mine or str(basetemp) in command
        if is_ours and any(name in command for name in _OURS):
            found.append(process)
    return found
