"""The tiny model under an adapter that is not zero, and as transformers runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tinker_local.ops import BaseModelInfo
from tiny_data import TINY

if TYPE_CHECKING:
    from tinker_local.engine import lora
    from tinker_local.engine.base_model import BaseModel


@pytest.fixture
def adapter(base_model: BaseModel) -> lora.Adapter:
    """An adapter whose B is not zero, so that A has a gradient too."""
    from engine_data import random_adapter

    return random_adapter(base_model)


@pytest.fixture(scope="session")
def plain(tiny_folder: Path) -> Any:
    """The tiny model with transformers' own sdpa attention, float32."""
    from engine_data import plain_model

    return plain_model(tiny_folder)


@pytest.fixture(scope="session")
def half_model(tiny_folder: Path) -> BaseModel:
    """The tiny model in bfloat16."""
    import torch

    from tinker_local.engine.base_model import BaseModel

    info = BaseModelInfo(TINY, tiny_folder, 4096)
    return BaseModel(info, torch.bfloat16, torch.device("cpu"))
