"""Linux system calls that Python's standard library does not offer, by ctypes.

Numbers are those of x86_64 and aarch64; on other machines `syscall_number` raises.
"""

from __future__ import annotations

import ctypes
import os
import platform

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAPABILITY_VERSION_3 = 0x20080522

# name: (x86_64, aarch64); None where the machine has no such call
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "seccomp": (317, 277),
    "capset": (126, 91),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}


def libc() -> ctypes.CDLL:
    """The C library, with errno kept."""
    return ctypes.CDLL(None, use_errno=True)


def machine() -> int:
    """The column of a table of system calls.

    Raises:
        OSError: No Linux, or a processor whose numbers are not known here.
    """
    columns = {"x86_64": 0, "aarch64": 1, "arm64": 1}
    if platform.system() != "Linux" or platform.machine() not in columns:
        raise OSError(f"no isolation on {platform.system()} {platform.machine()}")
    return columns[platform.machine()]


def call(name: str, *arguments: object) -> int:
    """A system call by its name.

    Raises:
        OSError: It failed.
    """
    number = NUMBERS[name][machine()]
    return checked(libc().syscall(number, *arguments), name)


def checked(result: int, name: str) -> int:
    """The result of a C function; -1 as an exception.

    Raises:
        OSError: It is -1.
    """
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones."""
    machine()
    checked(libc().unshare(ctypes.c_int(flags)), "unshare")


def no_new_privileges() -> None:
    """Let no program started from here gain rights; also what seccomp and Landlock demand."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(signal_number: int) -> None:
    """Get a signal when the parent's thread ends."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def drop_capabilities() -> None:
    """Give up all of root's rights, for good."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # none of that number, or not ours to drop: the set below is what counts
            continue
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def private_mounts() -> None:
    """Let no mount made from here be seen outside."""
    _mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)


def tmpfs(folder: str, size_bytes: int) -> None:
    """Lay an empty file system of limited size over a folder."""
    options = f"size={size_bytes},nr_inodes=1024,mode=0700".encode()
    _mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)


def read_only_mounts() -> None:
    """Make everything that is mounted read-only, in this mount namespace."""
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call(
        "mount_setattr",
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(b"/"),
        ctypes.c_uint(_AT_RECURSIVE),
        ctypes.byref(attributes),
        size,
    )


def _mount(
    source: bytes | None, target: bytes, kind: bytes | None, flags: int, data: bytes | None
) -> None:
    machine()
    checked(libc().mount(source, target, kind, ctypes.c_ulong(flags), data), "mount")


def _prctl(option: int, value: int) -> None:
    machine()
    zero = ctypes.c_ulong(0)
    checked(libc().prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero), "prctl")
