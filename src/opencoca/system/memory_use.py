"""Measures the memory that this process takes, as the operating system or the accelerator counts it."""

import os
import sys
from pathlib import Path

import torch


def resident_bytes() -> int:
    """Returns the memory of this process now; where the system does not say, the most that it has had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return _largest_resident()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory used so far: by tensors on an accelerator, or by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _largest_resident()


def _largest_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
