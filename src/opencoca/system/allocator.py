"""Memory settings for long work on a CPU: freed blocks are reused, and caches of compiled kernels are bounded."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# These bound oneDNN's cache of kernels and PyTorch's; both are read when the first kernel is compiled.
_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "32"}


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed blocks instead of returning them to the kernel; True if that worked.

    By default every large tensor gets new pages, which the kernel zeroes at first use; that costs more than many
    operations that fill the tensor. Matrix products of a training step ran about twice as fast (results/step_cost.md).
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


def release_freed_memory() -> bool:
    """Returns freed blocks to the kernel; True if there were any.

    Batches of varying lengths leave gaps of varying sizes, so that the kept memory grows; called now and then, this
    function holds it near what is in use.
    """
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def limit_kernel_caches() -> None:
    """Bounds the caches of compiled kernels; it must be called before the first matrix product.

    oneDNN compiles a kernel for every shape of a product in bf16, and batches of texts keep having new shapes: a step
    of a small model adds about sixty kernels of nearly a megabyte each, and two caches keep the last 1,024. A step
    needs fewer than 200. Settings that the environment has already are kept.
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
