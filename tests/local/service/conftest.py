"""The guarded application, inside the test's process, over an engine that computes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tinker_local.ops import BaseModelInfo
from tiny_data import TINY

if TYPE_CHECKING:
    from starlette.applications import Starlette

KEY = "tml-local-test"

Serving = contextlib.AbstractAsyncContextManager[httpx.AsyncClient]


class IdleEngine:
    """Knows its base model; whatever else it is asked for never comes to it in these tests."""

    def __init__(self) -> None:
        self.dropped: list[str] = []

    def base_models(self) -> list[BaseModelInfo]:
        return [BaseModelInfo(TINY, Path("/models/tiny"), 4096)]

    def drop_model(self, model_id: str) -> None:
        self.dropped.append(model_id)


@contextlib.asynccontextmanager
async def _serving(state_dir: Path, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    from tinker_local.service import create_app
    from tinker_local.service.guard import Guard

    engine: Any = IdleEngine()
    app: Starlette = create_app(engine, state_dir, **options)
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(Guard(app, KEY)),
        base_url="http://127.0.0.1:8000/api/v1",
        headers={"X-API-Key": KEY},
    )
    async with app.router.lifespan_context(app), client:
        yield client


@pytest.fixture
def key() -> str:
    return KEY


@pytest.fixture
def serving() -> Callable[..., Serving]:
    """`async with serving(state_dir, lost_after_s=...) as http` is a server's whole life."""
    return _serving


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server of the test's own; it holds the key."""
    async with _serving(tmp_path) as client:
        yield client
