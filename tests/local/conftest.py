"""The tiny model, in a cache of the test session's own, and an engine that serves it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tinker_local.ops import BaseModelInfo, LoraSpec
from tinker_local.weights import quiet_progress, resolve_model
from tiny_data import TINY

if TYPE_CHECKING:
    from tinker_local.engine import TorchEngine
    from tinker_local.engine.base_model import BaseModel

Create = Callable[..., str]

_numbers = itertools.count()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("engine-cache")
    return resolve_model(TINY, cache, progress=quiet_progress).folder


@pytest.fixture(scope="session")
def engine(tiny_folder: Path) -> TorchEngine:
    from tinker_local.engine import TorchEngine

    return TorchEngine({TINY: tiny_folder}, "float32")


@pytest.fixture(scope="session")
def base_model(tiny_folder: Path) -> BaseModel:
    """The base model alone, for tests of the parts below TorchEngine."""
    import torch

    from tinker_local.engine.base_model import BaseModel

    info = BaseModelInfo(TINY, tiny_folder, 4096)
    return BaseModel(info, torch.float32, torch.device("cpu"))


@pytest.fixture
def create(engine: TorchEngine) -> Iterator[Create]:
    """`create(rank=4, seed=0, ...)` makes a training client in `engine`, freed after the test."""
    created: list[str] = []

    def create_model(rank: int = 4, seed: int | None = 0, **modules: bool) -> str:
        model_id = f"model-{next(_numbers)}"
        engine.create_model(model_id, TINY, LoraSpec(rank=rank, seed=seed, **modules))
        created.append(model_id)
        return model_id

    yield create_model
    for model_id in created:
        engine.drop_model(model_id)
