"""Models for the tests: SmolLM2 from the shared cache, the tiny one from a cache of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tinker_local.weights import (
    DEFAULT_MODEL,
    TINY_MODEL,
    ModelFiles,
    cache_dir,
    quiet_progress,
    resolve_model,
)

Resolve = Callable[[str], ModelFiles]


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The default model: fetched once a machine (93 MB), then cached."""
    return resolve_model(DEFAULT_MODEL, cache_dir(), progress=quiet_progress)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    cache = tmp_path_factory.mktemp("tiny-cache")
    return resolve_model(TINY_MODEL, cache, progress=quiet_progress)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def resolve(cache: Path) -> Resolve:
    """`resolve_model` with an empty cache."""
    return lambda spec: resolve_model(spec, cache, progress=quiet_progress)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds nothing but a closed port, and the hub is off limits."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://reader:s3cret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
