"""Environments by name: of the cookbook or like its own, of `verifiers`, of `reasoning-gym`.

They run in the worker, outside any jail, so only installed modules are taken, never a path.
"""

from __future__ import annotations

import importlib.util
import inspect

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.policy.environments import cookbook, reasoning_gym, verifiers
from tinker_mcp.runs.policy.environments.place import HELD_OUT_GROUPS, Environment, Place
from tinker_mcp.runs.rl_options import EnvironmentSpec

__all__ = ["HELD_OUT_GROUPS", "Environment", "Place", "check", "holds_out", "opened"]

_PACKAGES = {
    "verifiers": ("verifiers", "verifiers"),
    "reasoning_gym": ("reasoning_gym", "reasoning-gym"),
}
"""What stands before the colon: the module it needs, and the extra that installs it."""


def holds_out(spec: EnvironmentSpec) -> bool | None:
    """Whether an environment that was checked holds groups out; None where it has yet to be made.

    It is for its builder to say. Blocks.
    """
    from tinker_cookbook.rl.types import EnvGroupBuilder

    kind = spec.name.partition(":")[0]
    if kind in _PACKAGES:
        return kind == "reasoning_gym"
    target = cookbook.named(spec.name)
    return False if inspect.isclass(target) and issubclass(target, EnvGroupBuilder) else None


def check(spec: EnvironmentSpec) -> None:
    """Whether there is such an environment here; imports its module. Blocks.

    Raises:
        InvalidInputError: There is none, it is not installed, or its module cannot be imported.
    """
    kind, _, name = spec.name.partition(":")
    if kind in _PACKAGES:
        _check_package(kind)
        if kind == "reasoning_gym":
            reasoning_gym.check(name)
        return
    cookbook.named(spec.name)


async def opened(spec: EnvironmentSpec, place: Place) -> Environment:
    """The environment, ready for its first batch.

    Raises:
        InvalidInputError: There is none of this name, or it cannot be made with these arguments.
    """
    kind, _, name = spec.name.partition(":")
    if kind == "reasoning_gym":
        _check_package(kind)
        reasoning_gym.check(name)
        return reasoning_gym.opened(name, spec.args, place)
    cookbook.make_at_home(place)
    if kind == "verifiers":
        _check_package(kind)
        return verifiers.opened(name, spec.args, place)
    return await cookbook.opened(spec, place)


def _check_package(kind: str) -> None:
    module, extra = _PACKAGES[kind]
    if importlib.util.find_spec(module) is None:
        raise InvalidInputError(
            f"{kind} environments need the package {extra}, which is not installed.",
            next_step=f'Ask the user to run: pip install "tinker-mcp[{extra}]", then call again.',
        )
