"""The garbage collector is left out for as long as was asked, and then it is back."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType

import pytest

from tinker_mcp import garbage

NEW = "a_module_of_this_test"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("block", [garbage.while_importing, garbage.while_building])
def test_it_is_off_inside_and_back_afterwards_also_after_an_error(
    block: Callable[[], AbstractContextManager[None]],
) -> None:
    with pytest.raises(ValueError, match="inside"), block():
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled()


@pytest.mark.parametrize("block", [garbage.while_importing, garbage.while_building])
def test_where_it_was_off_it_stays_off(
    block: Callable[[], AbstractContextManager[None]],
) -> None:
    gc.disable()
    with block():
        pass
    assert not gc.isenabled()


def test_only_what_came_with_modules_is_left_out_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = gc.get_freeze_count()
    with garbage.while_importing():
        pass
    assert gc.get_freeze_count() == frozen
    with garbage.while_importing():
        monkeypatch.setitem(sys.modules, NEW, ModuleType(NEW))
    assert gc.get_freeze_count() > frozen
