"""Homes whose local backend runs, and supervisors on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from detached import CYCLE_S, end_all

from servers import LocalServer, serve_tiny_alone, start_server
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings


def pytest_configure(config: pytest.Config) -> None:
    """Workers, and a backend that one started, outlive whoever started them on purpose."""
    config.addinivalue_line("filterwarnings", "ignore:subprocess .* is still running")


@pytest.fixture(autouse=True)
def _tiny_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_tiny_alone(monkeypatch)


@pytest.fixture(scope="session")
def runs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A backend where the workers of `runs_home` look for it."""
    server = start_server(tmp_path_factory.mktemp("runs-home") / "local")
    yield server
    end_all(server.state_dir.parent)
    server.stop()


@pytest.fixture(scope="session")
def paced_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The same for `paced_home`; it begins a cycle every CYCLE_S, as the hosted service does."""
    local = tmp_path_factory.mktemp("paced-home") / "local"
    server = start_server(local, "--cycle-s", str(CYCLE_S))
    yield server
    end_all(server.state_dir.parent)
    server.stop()


@pytest.fixture(scope="session")
def runs_home(runs_server: LocalServer) -> Path:
    """A home with a backend that works as fast as it can."""
    return runs_server.state_dir.parent


@pytest.fixture(scope="session")
def paced_home(paced_server: LocalServer) -> Path:
    """A home with a backend that takes CYCLE_S a step."""
    return paced_server.state_dir.parent


@pytest.fixture
def own_runs_home(tmp_path: Path) -> Iterator[Path]:
    """A home without a backend; whatever is started there is ended."""
    own = tmp_path / "own-runs-home"
    yield own
    end_all(own)


@pytest.fixture
def supervisor(runs_home: Path) -> Supervisor:
    return Supervisor(Settings(home=runs_home))


@pytest.fixture
def paced(paced_home: Path) -> Supervisor:
    """The supervisor of runs that take CYCLE_S a step."""
    return Supervisor(Settings(home=paced_home))
