"""Keeping the CPU's memory allocator from giving large blocks back after every operation."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed blocks instead of returning them to the kernel; True if it took the advice.

    By default every large tensor is mapped anew and its pages are zeroed at first touch, which costs more than many
    of the operations that fill it: matrix products of a training step ran about twice as fast (results/step_cost.md).
    """
    if os.name != "posix":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library: nothing to tune
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
