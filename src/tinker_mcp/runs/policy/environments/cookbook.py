"""Environments of the cookbook and those like its own: what a dotted path names."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.policy.environments.place import HELD_OUT_GROUPS, Environment, Place
from tinker_mcp.runs.rl_options import EnvironmentSpec

_DOTTED = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)+):(?P<name>[A-Za-z_]\w*)")


def named(name: str) -> Any:
    """What a dotted path names; imports its module.

    Raises:
        InvalidInputError: It is no such path, not installed, or cannot be imported.
    """
    found = _DOTTED.fullmatch(name)
    if found is None:
        raise InvalidInputError(
            f"environment={name[:100]!r} is none.",
            next_step="Give package.module:Name of an installed module, verifiers:NAME or "
            "reasoning_gym:NAME; a file of your own can be a reward, which is jailed.",
        )
    module = found["module"]
    if not _is_installed(module):
        raise InvalidInputError(
            f"environment={name!r}: there is no installed module {module!r}.",
            next_step="Ask the user to install the package that holds it: environments run "
            "without a jail, so files that merely lie somewhere are not taken.",
        )
    try:
        return getattr(importlib.import_module(module), found["name"])
    except Exception as error:  # whatever a module does while it is imported
        raise InvalidInputError(
            f"environment={name!r} cannot be loaded: {type(error).__name__}: {str(error)[:300]}",
            next_step="Check the name behind the colon, and what the module itself needs.",
        ) from error


def _is_installed(module: str) -> bool:
    """Whether it belongs to an installed distribution, or lies among those."""
    root = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if root in importlib.metadata.packages_distributions():
        return True
    folders = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    places = [Path(spec.origin).resolve()] if spec.origin else []
    return any(place.is_relative_to(folder) for place in places for folder in folders)


async def opened(spec: EnvironmentSpec, place: Place) -> Environment:
    """The environment that a dotted path names.

    Raises:
        InvalidInputError: There is none, or what it names gives no groups.
    """
    from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder

    target = named(spec.name)
    if inspect.isclass(target) and issubclass(target, EnvGroupBuilder):
        return _Factory(target, spec, place)
    made = _made(target, spec, place.known)
    if isinstance(made, RLDatasetBuilder):
        made = made()
    if inspect.isawaitable(made):
        made = await made
    made, held_out = made if isinstance(made, tuple) else (made, None)
    if isinstance(made, RLDataset):
        return _Dataset(made, held_out, spec.name)
    if isinstance(made, EnvGroupBuilder):
        return _Factory(target, spec, place)
    raise InvalidInputError(
        f"environment={spec.name!r} gives a {type(made).__name__}.",
        next_step="Name an EnvGroupBuilder, an RLDataset, an RLDatasetBuilder, or a function that "
        "returns one of them.",
    )


def _made(target: Any, spec: EnvironmentSpec, known: Mapping[str, Any]) -> Any:
    """Call it with what was given, and what it takes of what is known."""
    try:
        takes = inspect.signature(target).parameters
        filled = {
            name: value for name, value in known.items() if name in takes and name not in spec.args
        }
        return target(**filled, **spec.args)
    except Exception as error:  # whatever foreign code raises
        raise InvalidInputError(
            f"environment={spec.name!r} cannot be made: {type(error).__name__}: {str(error)[:300]}",
            next_step="Give what it needs in args: "
            '{"name": ..., "args": {...}}; sizes, renderer and model are filled in.',
        ) from error


@dataclass(frozen=True)
class _Dataset:
    """An RLDataset, from its beginning again when it is through.

    Attributes:
        test: The held-out one, or None.
    """

    dataset: Any
    test: Any
    name: str

    def batch(self, step: int) -> Sequence[Any]:
        batches = len(self.dataset)
        if batches < 1:
            raise InvalidInputError(
                f"environment={self.name!r} has not one whole batch.",
                next_step="Give a smaller batch_size.",
            )
        found: Sequence[Any] = self.dataset.get_batch((step - 1) % batches)
        return found

    def held_out(self) -> Sequence[Any]:
        found: list[Any] = []
        for index in range(len(self.test) if self.test is not None else 0):
            if len(found) >= HELD_OUT_GROUPS:
                break
            found += self.test.get_batch(index)
        return found[:HELD_OUT_GROUPS]


@dataclass(frozen=True)
class _Factory:
    """What makes an EnvGroupBuilder a call; it is told which one by `seed` or `index`."""

    target: Any
    spec: EnvironmentSpec
    place: Place

    def batch(self, step: int) -> Sequence[Any]:
        first = (step - 1) * self.place.batch_size
        return [
            _made(
                self.target,
                self.spec,
                {**self.place.known, "seed": self.place.seed + number, "index": number},
            )
            for number in range(first, first + self.place.batch_size)
        ]

    def held_out(self) -> Sequence[Any]:
        return ()


def make_at_home(place: Place) -> None:
    """Have the cookbook's helpers find this run's tokenizer, renderer and backend.

    For this process alone, which is a worker's. The cookbook has a registry of tokenizers, but
    none for what it knows of models, such as the renderer of one that is served locally.
    """
    from tinker_cookbook import model_info
    from tinker_cookbook.tokenizer_utils import register_tokenizer

    own, known = place.renderer, model_info.get_recommended_renderer_names

    def recommended(model_name: str) -> list[str]:
        return [own.name] if model_name == own.model_name else known(model_name)

    model_info.get_recommended_renderer_names = recommended
    register_tokenizer(own.model_name, lambda: own.tokenizer)
    os.environ.setdefault("TINKER_BASE_URL", place.backend.base_url)
    if place.backend.api_key:
        os.environ.setdefault("TINKER_API_KEY", place.backend.api_key)
