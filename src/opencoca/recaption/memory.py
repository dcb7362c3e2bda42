"""Chooses how many images to caption at a time: measures the memory of one, and divides the budget by it."""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opencoca.recaption.captioner import Captioner

# Larger batches gain nothing on a CPU; on a GPU, the waiting ones would fill the machine's memory.
_LARGEST_BATCH = {"cpu": 32, "cuda": 256}
_SHARE_OF_FREE = 0.5
# Kernels' scratch space and the allocator's gaps, which are not measured.
_OVERHEAD = 1.5
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Reads a number of bytes such as "4GB", "512 MiB", "800M" or "1e9". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    try:
        value = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{text!r} is no amount of memory; write it as in 4GB or 512MB")
    return value


def choose_batch_size(captioner: Captioner, num_images: int, budget_bytes: int | None = None) -> int:
    """Returns the largest power of two of images that fit into the budget (None: half of the free memory).

    It is at most 32 on a CPU and 256 on a GPU, and at least 1 even if that does not fit.
    """
    device = captioner.device
    most = min(_LARGEST_BATCH.get(device.type, 32), max(1, num_images))
    if most > 1:
        budget = budget_bytes if budget_bytes is not None else int(_SHARE_OF_FREE * free_bytes(device))
        fitting = budget // max(1, measure_bytes_per_image(captioner))
        most = max(1, min(most, fitting))
    return 1 << (most.bit_length() - 1)


def measure_bytes_per_image(captioner: Captioner) -> int:
    """Measures the memory that each further image takes: the difference between batches of two and of one."""
    height, width = captioner.image_size
    captioner(torch.zeros(1, 3, height, width), ["0"])  # what is set up once does not belong to an image
    one, two = (_peak_bytes(captioner, torch.zeros(count, 3, height, width)) for count in (1, 2))
    # The batch itself and the next one as float32, and two more as bytes.
    waiting = 3 * height * width * (2 * 4 + 2)
    return int(_OVERHEAD * max(0, two - one)) + waiting


def _peak_bytes(captioner: Captioner, pixels: Tensor) -> int:
    """Measures the most memory that tensors take while these images are captioned."""
    names = [str(index) for index in range(len(pixels))]
    if captioner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(captioner.device)
        captioner(pixels, names)
        return torch.cuda.max_memory_allocated(captioner.device)
    with _PeakMemory() as memory:
        captioner(pixels, names)
    return memory.peak


class _PeakMemory(TorchDispatchMode):
    """Adds up the bytes of the tensors that exist at the same time; `peak` is the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.total = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:  # else: weights that are packed
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address == 0 or address in self.live:
            return
        self.live[address] = storage.nbytes()
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self.total -= self.live.pop(address, 0)


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a GPU, or of the machine, within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    candidates = [_machine_free_bytes()]
    with contextlib.suppress(OSError, ValueError):  # control groups, version 2; "max" stands for no limit
        group = Path("/sys/fs/cgroup")
        candidates.append(
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + _cache_bytes(group)
        )
    return max(0, min(candidates))


def _cache_bytes(group: Path) -> int:
    """Returns the bytes of file cache that a control group would free if needed."""
    rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(rows.get("inactive_file", 0))


def _machine_free_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * 2**30  # neither is known on Windows
