"""What this machine offers: device, number format, memory allocator."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from pathlib import Path
from typing import Literal

import torch

DtypeName = Literal["auto", "float32", "bfloat16"]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>
_KEEP_BYTES = 2**31 - 1


def pick_device() -> torch.device:
    """The first CUDA device where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The format of the base weights; adapters and optimizer are float32 in any case.

    `auto` is bfloat16 where the hardware multiplies it natively (a GPU, AVX512-BF16, AMX), since
    there it is 1.6x to 5x as fast as float32; elsewhere it is emulated and slower.
    """
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if device.type == "cuda" or _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel after each step.

    A training step allocates and frees the same gigabytes again and again. With glibc's defaults
    each comes from a fresh mmap, which costs a page fault every 4 KiB: 1.1 to 1.6 million of them
    a step of 2,048 tokens. Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
    libc.mallopt(_M_TOP_PAD, 256 * 2**20)


def spare_garbage_collector() -> None:
    """Have Python's collector look only at what is made from now on.

    torch and transformers leave 350,000 objects that stay to the end. Looking through them again
    and again takes 5 % of the time in which one sequence is drawn.
    """
    gc.collect()
    gc.freeze()


def _cpu_multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # not Linux: not every Apple chip has it, and float32 is always right
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags
