"""The order in which samples are seen: a pure function of (seed, epoch, position), so resuming needs no stored state.

Letters: B samples of a process's part of a batch, P any positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np


class Visits(NamedTuple):
    """The samples that are seen, and the number of times that each was seen before: (B,) int64 both."""

    indices: np.ndarray
    passes: np.ndarray


class SampleOrder(ABC):
    """Every sample once an epoch, cut into global batches.

    Nothing is remembered between calls: `batch(epoch, step, ...)` returns the same samples whatever was asked before,
    so a run continued at (epoch, step) sees what an uninterrupted one would have. What is random is made from the raw
    stream of the PCG64 generator alone, which NumPy guarantees never to change.

    Args:
        num_samples: number of samples, 1 or more.
        seed: 0 or more.
        drop_last: whether an incomplete last batch of an epoch is left out; which samples that concerns differs from
            epoch to epoch. Otherwise the last batch is smaller.
        micro_batches: the number of parts, as even as possible, that a batch is cut into. Each process gets a share of
            every part, so that what one part holds does not depend on the number of processes.
    """

    def __init__(self, num_samples: int, seed: int, *, drop_last: bool = True, micro_batches: int = 1):
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {num_samples}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.num_samples = num_samples
        self.seed = seed
        self.drop_last = drop_last
        self.micro_batches = micro_batches

    @abstractmethod
    def take(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions of an epoch: (P,) int64 -> (P,) int64."""

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
        """One process's part of one global batch: (B,) int64 sample indices.

        Args:
            epoch, step: position; `step` counts global batches from the epoch's start.
            batch_size: global, over all processes; a multiple of `world_size`.
            rank, world_size: which of the equal contiguous slices to return; the slices of ranks 0, 1, ... joined are
                the batch that one process would see (with several micro-batches: of each of them, one after another).
                In a smaller last batch their sizes differ by at most 1.

        Raises:
            ValueError: a position beyond the epoch's end, or a batch that can't be divided.
        """
        return self.visits(epoch, step, batch_size, rank=rank, world_size=world_size).indices

    def visits(self, epoch: int, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Visits:
        """Returns the samples of `batch`, with the number of the pass over the samples that each visit belongs to."""
        parts = self._parts(step, batch_size, rank, world_size)
        positions = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        return self._visit(epoch, positions, batch_size)

    def micro_batch_sizes(self, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> tuple[int, ...]:
        """Counts the samples of `batch` in each micro-batch, in their order. Raises as `batch` does."""
        return tuple(part.stop - part.start for part in self._parts(step, batch_size, rank, world_size))

    def _visit(self, epoch: int, positions: np.ndarray, batch_size: int) -> Visits:
        return Visits(self.take(epoch, positions), np.full(len(positions), epoch))

    def _parts(self, step: int, batch_size: int, rank: int, world_size: int) -> list[slice]:
        """Returns the positions, in the epoch's order, of the process's slice of each micro-batch."""
        steps = self.steps_per_epoch(batch_size)
        if not 0 <= step < steps:
            raise ValueError(f"step must be in 0..{steps - 1}, got {step}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} samples can't be divided between {world_size} processes")
        first = step * batch_size
        size, larger = divmod(min(batch_size, self.num_samples - first), self.micro_batches)
        parts = []
        for part in range(self.micro_batches):
            length = size + (part < larger)
            parts.append(slice(first + length * rank // world_size, first + length * (rank + 1) // world_size))
            first += length
        return parts


class EpochOrder(SampleOrder):
    """A new permutation of all samples for every epoch. Memory: 8 bytes a sample."""

    # The latest epoch and its order; one tuple, so that threads see both parts or neither.
    _latest: tuple[int, np.ndarray] | None = None

    def take(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        latest = self._latest
        if latest is None or latest[0] != epoch:
            latest = self._latest = (epoch, random_permutation(self.num_samples, self.seed, epoch))
        return latest[1][positions]


class BlockOrder(SampleOrder):
    """A shuffle of blocks, and of the samples within windows of them, so that remote data are read block by block.

    The blocks of all shards are permuted anew for every epoch; `window_blocks` of them in a row make a window, whose
    samples are permuted among themselves. At any time samples of one window are read, at its border those of two.
    Memory: 16 bytes a block.

    Args:
        num_samples, seed, drop_last, micro_batches: see `SampleOrder`.
        block_starts: index of the first sample of each block, from 0 upwards.
        window_blocks: blocks whose samples are mixed.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        block_starts: np.ndarray,
        *,
        window_blocks: int = 64,
        drop_last: bool = True,
        micro_batches: int = 1,
    ):
        super().__init__(num_samples, seed, drop_last=drop_last, micro_batches=micro_batches)
        if window_blocks < 1:
            raise ValueError(f"window_blocks must be 1 or more, got {window_blocks}")
        self._starts = np.asarray(block_starts, dtype=np.int64)
        self._sizes = np.diff(self._starts, append=num_samples)
        assert self._starts[0] == 0
        assert (self._sizes > 0).all()
        self.window_blocks = window_blocks
        self._latest: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def take(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        _, starts = self._blocks(epoch)
        windows = np.searchsorted(starts, positions, side="right") - 1
        result = np.empty(len(positions), dtype=np.int64)
        for window in np.unique(windows):
            rows = windows == window
            result[rows] = self._window(epoch, int(window))[positions[rows] - starts[window]]
        return result

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of blocks, and the position at which each window begins."""
        latest = self._latest
        if latest is None or latest[0] != epoch:
            permutation = random_permutation(len(self._starts), self.seed, epoch)
            ends = np.cumsum(self._sizes[permutation])
            starts = np.concatenate([[0], ends[:-1]])[:: self.window_blocks]
            latest = self._latest = (epoch, permutation, starts)
        return latest[1], latest[2]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        known = self._windows.get((epoch, window))
        if known is None:
            first = window * self.window_blocks
            blocks = self._blocks(epoch)[0][first : first + self.window_blocks]
            ranges = zip(self._starts[blocks].tolist(), self._sizes[blocks].tolist(), strict=True)
            samples = [np.arange(start, start + size) for start, size in ranges]
            joined = np.concatenate(samples)
            known = joined[random_permutation(len(joined), self.seed, epoch, window)]
            latest = list(self._windows.items())[-3:]
            self._windows = {**dict(latest), (epoch, window): known}
        return known


def random_permutation(length: int, *seeds: int) -> np.ndarray:
    """A permutation that the seeds alone decide: (length,) int64."""
    if seeds[1] < 0:
        raise ValueError(f"epoch must be 0 or more, got {seeds[1]}")
    bits = np.random.PCG64(np.random.SeedSequence(list(seeds))).random_raw(length)
    return np.argsort(bits, kind="stable").astype(np.int64)
