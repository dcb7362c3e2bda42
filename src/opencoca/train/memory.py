"""Keeping the CPU's memory allocator from giving large blocks back after every operation."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed blocks instead of returning them to the kernel; True if it took the advice.

    By default every large tensor is mapped anew and its pages are zeroed at first touch, which costs more than many
    of the operations that fill it: matrix products of a training step ran about twice as fast (results/step_cost.md).
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


def release_freed_memory() -> bool:
    """Gives back what is free after all; True if something was.

    Batches of ever different lengths leave gaps of ever different sizes, so that kept memory grows; given back now and
    then, it stays near what is in use.
    """
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def _glibc() -> ctypes.CDLL | None:
    if os.name != "posix":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError):  # another C library: nothing to tune
        return None
