"""Memory of long work on a CPU: freed blocks are kept for the next batch, compiled kernels not for ever."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# oneDNN's own cache of kernels, and PyTorch's beside it; they read these when they compile their first kernel.
_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "32"}


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


def limit_kernel_caches() -> None:
    """Bounds what is kept of kernels compiled for single shapes; it must be called before the first matrix product.

    oneDNN compiles a kernel for every shape of a product in bf16, and batches of texts have ever new ones: a step of a
    small model brings some sixty, each with most of a megabyte, and two caches keep the last 1,024. A step needs less
    than 200, each of them several times. What the environment says already is left as it is.
    """
    for name, capacity in _KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)


def _glibc() -> ctypes.CDLL | None:
    if os.name != "posix":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError):  # another C library: nothing to tune
        return None
