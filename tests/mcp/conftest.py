"""A home whose local backend runs, and agents that call tools on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from servers import LocalServer, end_backends, serve_tiny_alone, start_server
from tinker_mcp.settings import Settings
from tinker_mcp.training.backend import Backend

if TYPE_CHECKING:
    from tinker_mcp.training.rendering import ModelRenderer


def pytest_configure(config: pytest.Config) -> None:
    """The server leaves the backend that it started alive on purpose, for the user's others."""
    config.addinivalue_line("filterwarnings", "ignore:subprocess .* is still running")


@pytest.fixture(autouse=True)
def _tiny_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_tiny_alone(monkeypatch)


@pytest.fixture(scope="session")
def home_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A backend in the place where a server of `home` looks for it."""
    server = start_server(tmp_path_factory.mktemp("home") / "local")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def home(home_server: LocalServer) -> Path:
    return home_server.state_dir.parent


@pytest.fixture
def settings(home: Path, tmp_path: Path) -> Settings:
    return Settings(home=home, roots=(tmp_path,))


@pytest.fixture
def own_home(tmp_path: Path) -> Iterator[Path]:
    """A home without a backend; whatever is started there is ended."""
    own = tmp_path / "own-home"
    yield own
    end_backends(own)


@pytest.fixture(scope="session")
def hub_cache(home_server: LocalServer) -> Path:
    return Path(home_server.env["HF_HOME"]) / "hub"


@pytest.fixture(scope="session")
def backend(home_server: LocalServer, hub_cache: Path) -> Backend:
    return Backend("local", home_server.base_url, home_server.api_key, hub_cache)


@pytest.fixture(scope="session")
def tiny(backend: Backend) -> ModelRenderer:
    """The tiny model's renderer; its tokens are the bytes of the text."""
    from tinker_mcp.training import rendering

    return rendering.load(backend, "tinker-local/tiny", None)
