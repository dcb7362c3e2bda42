"""What kind of processor this is, and how many threads may work on it."""

import os
import sys
import time
from pathlib import Path

import torch

_IS_WINDOWS = os.name == "nt"
_CPU_INFO, _LOAD = Path("/proc/cpuinfo"), Path("/proc/loadavg")
_CGROUP_V2, _CGROUP_V1 = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LOAD_SAMPLES, _LOAD_INTERVAL_S = 4, 0.005


def cpu_vendor() -> str:
    """The processor's maker, as the processor calls it; empty if that is not known."""
    if _IS_WINDOWS:
        return os.environ.get("PROCESSOR_IDENTIFIER", "").rpartition(", ")[2]
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def has_avx512() -> bool:
    """Whether the processor works on 512 bits at a time."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; products of such numbers are many times slower without."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def limit_threads(wanted: int | None = None) -> str | None:
    """Sets PyTorch's number of threads to that of the processors that nobody uses; returns a line that says so.

    Threads wait for one another at the end of every operation: where another program has one of the processors, all
    wait for the slowest. The number is only ever lowered, and is left alone if the environment sets it.

    Args:
        wanted: the number to set instead, as far as there are processors.

    Returns None if nothing was changed because of other programs.
    """
    if any(os.environ.get(name) for name in _THREAD_VARIABLES):
        return None
    now = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(max(1, min(wanted, now)))
        return None
    chosen = max(1, min(now, free_processors()))
    if chosen == now:
        return None
    torch.set_num_threads(chosen)
    return f"{chosen} of {now} threads, as other programs are busy here (OMP_NUM_THREADS sets another number)"


def free_processors() -> int:
    """The number of processors that this process may use and that no other program is using; it may be below 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _quota(), (os.cpu_count() or 1) - _busy_processors())


def _busy_processors() -> int:
    """How many processors other programs use now, as far as the system says.

    The load average alone would count work that ended a minute ago.
    """
    counts = []
    for number in range(_LOAD_SAMPLES):
        time.sleep(_LOAD_INTERVAL_S if number else 0)
        try:
            counts.append(int(_LOAD.read_text().split()[3].partition("/")[0]) - 1)  # this process is one of them
        except (OSError, ValueError, IndexError):
            return round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    return max(0, min(counts))


def _quota() -> int:
    """The number of processors that the process's control group allows; a large number if it does not limit them."""
    try:
        quota, period = _CGROUP_V2.read_text().split()[:2]
    except (OSError, ValueError):
        try:
            quota, period = ((_CGROUP_V1 / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return sys.maxsize
    if not quota.isdigit() or not int(period):  # "max", or -1
        return sys.maxsize
    return max(1, int(quota) // int(period))
