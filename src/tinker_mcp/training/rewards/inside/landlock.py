"""Landlock: which files a process may touch at all (Linux 5.13 and later).

Written out rather than taken from the `landlock` package: it is three system calls, and whatever
is imported here would have to be readable and trusted inside every jail.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence

from tinker_mcp.training.rewards.inside import kernel

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE = 1 << 14
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_BIND_AND_CONNECT_TCP = 0b11  # ABI 4
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11  # ABI 6
_VERSION_FLAG = 1
_PATH_BENEATH = 1
READS_COMPLETE_ABI = 3
"""From here on truncating a file is a right of its own; before, anybody may."""


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """The kernel's version of Landlock; 0 without it."""
    try:
        null, size = ctypes.c_void_p(None), ctypes.c_size_t(0)
        return kernel.call("landlock_create_ruleset", null, size, ctypes.c_uint32(_VERSION_FLAG))
    except OSError:
        return 0


def restrict(
    readable: Sequence[str],
    listable: Sequence[str],
    writable: Sequence[str],
    devices: Sequence[str],
) -> int:
    """Deny this process every file but these, and TCP where the kernel can; for good.

    Args:
        readable: Files and folders (with all below) to read.
        listable: Folders whose names, with all below, may be seen; Python looks for modules so.
        writable: Folders to do anything in but execute.
        devices: Files to read and write.

    Returns:
        The ABI it holds by.

    Raises:
        OSError: The kernel has no Landlock, or refuses.
    """
    version = abi()
    if version == 0:
        raise OSError("no Landlock")
    handled = _RIGHTS_BY_ABI[max(known for known in _RIGHTS_BY_ABI if known <= version)]
    rules = _Ruleset(
        handled,
        _NET_BIND_AND_CONNECT_TCP if version >= 4 else 0,
        _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if version >= 6 else 0,
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = kernel.call(
        "landlock_create_ruleset",
        ctypes.byref(rules),
        ctypes.c_size_t(size),
        ctypes.c_uint32(0),
    )
    try:
        for path in readable:
            _allow(ruleset, path, (_READ_FILE | _READ_DIR) & handled)
        for path in listable:
            _allow(ruleset, path, _READ_DIR)
        for path in writable:
            _allow(ruleset, path, handled & ~_EXECUTE)
        for path in devices:
            _allow(ruleset, path, (_READ_FILE | _WRITE_FILE) & handled)
        kernel.call("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, access: int) -> None:
    with contextlib.suppress(FileNotFoundError, PermissionError, NotADirectoryError):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            is_folder = os.path.isdir(path)  # noqa: PTH112  # pathlib would be one more import
            granted = access if is_folder else access & _OF_FILES
            rule = _PathBeneath(granted, place)
            kernel.call(
                "landlock_add_rule",
                ctypes.c_int(ruleset),
                ctypes.c_int(_PATH_BENEATH),
                ctypes.byref(rule),
                ctypes.c_uint32(0),
            )
        finally:
            os.close(place)
