"""The order in which samples are seen: a pure function of (seed, epoch, step), so resuming needs no stored state."""

from __future__ import annotations

import numpy as np


class EpochOrder:
    """A new permutation of the samples for every epoch, cut into global batches.

    Nothing is remembered between calls: `batch(epoch, step, ...)` returns the same samples whatever was asked before,
    so a run continued at (epoch, step) sees what an uninterrupted one would have. The permutation is made from the raw
    stream of the PCG64 generator alone, which NumPy guarantees never to change.

    Args:
        num_samples: number of samples, 1 or more.
        seed: 0 or more.
        drop_last: whether an epoch ends before the last batch where that would be incomplete. The few samples left out
            then differ from epoch to epoch. Otherwise the last batch is smaller.
    """

    def __init__(self, num_samples: int, seed: int, *, drop_last: bool = True):
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {num_samples}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.num_samples = num_samples
        self.seed = seed
        self.drop_last = drop_last
        # Only saves repeating the sort; one tuple, so that threads see both parts or neither.
        self._latest: tuple[int, np.ndarray] | None = None

    def indices(self, epoch: int) -> np.ndarray:
        """The whole epoch's order: (num_samples,) int64, every sample once, read-only."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        latest = self._latest
        if latest is None or latest[0] != epoch:
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_samples)
            permutation = np.argsort(bits, kind="stable").astype(np.int64)
            permutation.flags.writeable = False
            latest = self._latest = (epoch, permutation)
        return latest[1]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of global batches of `batch_size` samples in an epoch.

        Raises ValueError if it isn't at least 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if not self.drop_last:
            return -(-self.num_samples // batch_size)
        if batch_size > self.num_samples:
            raise ValueError(
                f"a batch of {batch_size} samples is more than the {self.num_samples} there are; lower the batch size"
            )
        return self.num_samples // batch_size

    def batch(self, epoch: int, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """One process's part of one global batch: int64 sample indices.

        Args:
            epoch, step: position; `step` counts global batches from the epoch's start.
            batch_size: global, over all processes; a multiple of `world_size`.
            rank, world_size: which of the equal contiguous slices to return; the slices of ranks 0, 1, ... joined are
                the batch that one process would see. In a smaller last batch their sizes differ by at most 1.

        Raises:
            ValueError: a position beyond the epoch's end, or a batch that can't be divided.
        """
        steps = self.steps_per_epoch(batch_size)
        if not 0 <= step < steps:
            raise ValueError(f"step must be in 0..{steps - 1}, got {step}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} samples can't be divided between {world_size} processes")
        whole = self.indices(epoch)[step * batch_size : (step + 1) * batch_size]
        return whole[len(whole) * rank // world_size : len(whole) * (rank + 1) // world_size]
