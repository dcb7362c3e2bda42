"""The memory that tensors take at the same time, as it really is while captions are made."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opencoca.recaption import Captioner


def measured_bytes_per_image(captioner: Captioner) -> int:
    """What one image more takes: an eighth of the difference between batches of 80 and of 72.

    They are larger than those for which weights are rearranged, which takes memory too.
    """
    height, width = captioner.image_size
    peaks = []
    for count in (1, 72, 80):  # what is set up once does not belong to an image
        pixels = torch.zeros(count, 3, height, width)
        with PeakMemory() as memory:
            captioner(pixels, [str(index) for index in range(count)])
        peaks.append(memory.peak)
    return (peaks[2] - peaks[1]) // 8


class PeakMemory(TorchDispatchMode):
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
