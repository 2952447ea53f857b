"""torch's compiler, loaded when somebody compiles and not before.

transformers' modelling code, and torch's own initialization of weights, name it in decorators that
tell it what to leave alone. That loads `torch._dynamo` and sympy with it: a quarter of the time in
which the server starts, and 66 MB, where nothing is ever compiled. Stands in for it until anything
else is asked of it. For a process of our own alone: a library may count on what else that loads.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")

_COMPILER = "torch._dynamo"
_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"


class _Later(ModuleType):
    """A module that is imported at the first use of what the stand-in does not have."""

    special_names: ClassVar[frozenset[str]] = frozenset()

    def __getattr__(self, name: str) -> Any:
        # Whoever walks through all modules asks each for its `__file__`.
        if name.startswith("__") and name not in self.special_names:
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Compiler(_Later):
    """`torch._dynamo`: without a compiler there is nothing to tell it."""

    special_names = frozenset({"__path__"})  # what an import of a submodule asks for

    @staticmethod
    def disable(function: T | None = None, *_: object, **__: object) -> T | Callable[[T], T]:
        return (lambda given: given) if function is None else function

    @staticmethod
    def allow_in_graph(function: T) -> T:
        return function

    @staticmethod
    def graph_break(_reason: str = "") -> None:
        """What `torch.optim` says at each step: the compiler, if it ran, would begin anew."""


class _Masks(_Later):
    """What `transformers.masking_utils` imports, for the masks that it makes with vmap."""

    @staticmethod
    def TransformGetItemToIndex() -> Any:
        return _real(_MASKS).TransformGetItemToIndex()


def _real(name: str) -> Any:
    for stand_in in (_COMPILER, _MASKS):
        if isinstance(sys.modules.get(stand_in), _Later):
            del sys.modules[stand_in]
    return importlib.import_module(name)


def stand_in() -> None:
    """Put the stand-ins where the compiler is not loaded yet; call before transformers' models."""
    if _COMPILER not in sys.modules:
        sys.modules[_COMPILER] = _Compiler(_COMPILER)
        sys.modules[_MASKS] = _Masks(_MASKS)
