"""seccomp: which system calls a process may make; a filter of our own, in the kernel's language.

Written out rather than taken from `pyseccomp`, which needs libseccomp, a system package. It denies
by name and everything newer than it knows, because allowing by name would break numpy and the
like with each of their releases. What it denies: sockets; processes and programs; reaching into,
signalling or slowing other processes; mounts, keys, modules, clocks; shared memory outside the
limits; io_uring, which would go around the filter; changes to files' modes, owners and times,
which Landlock does not know.
"""

from __future__ import annotations

import ctypes
import os
from typing import TypeAlias

from tinker_mcp.training.rewards.inside import kernel

Instruction: TypeAlias = tuple[int, int, int, int]  # code, jump if true, jump if false, operand

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_KILL_PROCESS, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCHITECTURE = 0, 4  # places in struct seccomp_data
_ARCHITECTURES = (0xC000003E, 0xC00000B7)
_NEWEST_KNOWN = 451
_SET_MODE_FILTER = 1

_CLONE_THREAD = 0x00010000
_F_SETOWN, _F_SETOWN_EX = 8, 15
_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP = 0x5412, 0x541C, 0x8901, 0x8902
_PR_SET_PDEATHSIG = 1

# name: (x86_64, aarch64)
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # the network; socketpair stays, asyncio needs it, and with connect denied it leads nowhere
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242),
    "bind": (49, 200), "listen": (50, 201), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "recvmsg": (47, 212), "recvmmsg": (299, 243),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # programs, and other processes
    "execve": (59, 221), "execveat": (322, 281), "unshare": (272, 97), "setns": (308, 268),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "move_pages": (279, 239), "migrate_pages": (256, 238),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    # the machine
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "bpf": (321, 280), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89), "syslog": (103, 116),
    "personality": (135, 92), "vhangup": (153, 58), "uselib": (134, None),
    "fanotify_init": (300, 262), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "sync": (162, 81), "syncfs": (306, 267),
    # memory that no limit of the process counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182), "mq_timedreceive": (243, 183), "mq_notify": (244, 184),
    # what Landlock does not cover of files
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
_FORKS: dict[str, tuple[int | None, int | None]] = {"fork": (57, None), "vfork": (58, None)}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_KILL, _TGKILL, _PRLIMIT64 = (62, 129), (234, 131), (302, 261)
_FCNTL, _IOCTL, _PRCTL, _SENDTO = (72, 25), (16, 29), (157, 167), (44, 206)


def restrict_keeper() -> None:
    """Deny what no code of a jail needs, and let it still start and end workers; for good."""
    _install([*_start(), *_denials(_DENIED, _EPERM), _returns(_ALLOW)])


def restrict_worker() -> None:
    """Deny new processes too, and whatever reaches another process than this one; for good.

    Raises:
        OSError: The kernel has no seccomp, or refuses.
    """
    column, own = kernel.machine(), os.getpid()
    program = [
        *_start(),
        *_denials({**_DENIED, **_FORKS}, _EPERM),
        # Its flags lie in memory, out of a filter's sight; told that there is none, the C library
        # uses clone.
        *_denials({"clone3": _CLONE3}, _ENOSYS),
        *_unless(_CLONE[column], 0, [(_ANY_BIT, _CLONE_THREAD)]),
        *_unless(_KILL[column], 0, [(_EQUAL, own)]),
        *_unless(_TGKILL[column], 0, [(_EQUAL, own)]),
        *_unless(_PRLIMIT64[column], 0, [(_EQUAL, 0), (_EQUAL, own)]),
        *_if(_FCNTL[column], 1, [_F_SETOWN, _F_SETOWN_EX]),
        *_if(_IOCTL[column], 1, [_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP]),
        *_if(_PRCTL[column], 0, [_PR_SET_PDEATHSIG]),
        *_without_address(_SENDTO[column]),
        _returns(_ALLOW),
    ]
    _install(program)


def _start() -> list[Instruction]:
    """Another architecture's calls end the process; unknown ones do not exist."""
    return [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[kernel.machine()]),
        _returns(_KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        (_GREATER, 0, 1, _NEWEST_KNOWN),  # x86_64's x32 calls, from 2**30 on, too
        _returns(_ERRNO | _ENOSYS),
    ]


def _denials(calls: dict[str, tuple[int | None, int | None]], code: int) -> list[Instruction]:
    numbers = [number for pair in calls.values() if (number := pair[kernel.machine()]) is not None]
    return [
        line for number in numbers for line in ((_EQUAL, 0, 1, number), _returns(_ERRNO | code))
    ]


def _unless(number: int, argument: int, tests: list[tuple[int, int]]) -> list[Instruction]:
    """Deny a call unless its argument (32 bits) passes one of the tests."""
    body: list[Instruction] = [(_LOAD, 0, 0, _low(argument))]
    for index, (test, operand) in enumerate(tests):
        body.append((test, len(tests) - index, 0, operand))
    return _block(number, [*body, _returns(_ERRNO | _EPERM)])


def _if(number: int, argument: int, operands: list[int]) -> list[Instruction]:
    """Deny a call if its argument (32 bits) is one of the operands."""
    body: list[Instruction] = [(_LOAD, 0, 0, _low(argument))]
    for index, operand in enumerate(operands):
        is_last = index == len(operands) - 1
        body.append((_EQUAL, len(operands) - 1 - index, 1 if is_last else 0, operand))
    return _block(number, [*body, _returns(_ERRNO | _EPERM)])


def _without_address(number: int) -> list[Instruction]:
    """Deny sendto with an address; without one it is send."""
    body: list[Instruction] = [
        (_LOAD, 0, 0, _low(4)),
        (_EQUAL, 0, 2, 0),
        (_LOAD, 0, 0, _low(4) + 4),
        (_EQUAL, 1, 0, 0),
        _returns(_ERRNO | _EPERM),
    ]
    return _block(number, body)


def _block(number: int, body: list[Instruction]) -> list[Instruction]:
    """`body` for one system call; after it the number is loaded again."""
    return [(_EQUAL, 0, len(body) + 1, number), *body, (_LOAD, 0, 0, _NUMBER)]


def _low(argument: int) -> int:
    """Where the low half of an argument lies, on little-endian machines."""
    return 16 + 8 * argument


def _returns(action: int) -> Instruction:
    return _RETURN, 0, 0, action


class _Line(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("true", ctypes.c_uint8),
        ("false", ctypes.c_uint8),
        ("operand", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("lines", ctypes.POINTER(_Line)))


def _install(program: list[Instruction]) -> None:
    lines = (_Line * len(program))(*(_Line(*line) for line in program))
    whole = _Program(len(program), lines)
    kernel.call(
        "seccomp",
        ctypes.c_uint(_SET_MODE_FILTER),
        ctypes.c_uint(0),
        ctypes.byref(whole),
    )
