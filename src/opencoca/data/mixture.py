"""Several sources in one training run, each with its share of every stretch of the order.

Letters: K sources, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opencoca.data.order import BlockOrder, EpochOrder, SampleOrder, Visits, random_permutation
from opencoca.data.source import SampleSource
from opencoca.data.sources import JoinedSource

PATTERN_LENGTH = 1024
"""Positions after which every source has had its exact share; shares are rounded to multiples of 1 / 1024."""


class MixedSource(JoinedSource):
    """Sources that are trained on together.

    Args:
        sources: one or more.
        weights: of each, in proportion to which its samples are shown; 1 for as many as it has. A source of a million
            samples at weight 0.5 is seen half as often as one of a million at weight 1.
    """

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float]):
        super().__init__(sources)
        if not sources or len(weights) != len(sources):
            raise ValueError(f"{len(sources)} sources of data need as many weights, got {len(weights)}")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"the weights of data sources must be positive numbers, got {list(weights)}")
        self.weights = tuple(map(float, weights))

    @property
    def shares(self) -> np.ndarray:
        """(K,) float64: the part of all visits that each source gets."""
        amounts = np.array([weight * len(source) for weight, source in zip(self.weights, self.sources, strict=True)])
        return amounts / amounts.sum()


class MixedOrder(SampleOrder):
    """An order in which a shuffled pattern gives positions to sources; each source has an order and passes of its own.

    An epoch has as many visits as there are samples, but a source passes through all of its own samples before it
    shows one of them again, wherever epochs of the mixture end: nothing is left out at their ends.

    Args:
        orders: of the sources, in the order in which their indices are joined.
        shares: (K,) part of the visits that each gets, adding up to 1.
        seed, drop_last, micro_batches: see `SampleOrder`.
    """

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        shares: np.ndarray,
        seed: int,
        *,
        drop_last: bool = True,
        micro_batches: int = 1,
    ):
        super().__init__(sum(o.num_samples for o in orders), seed, drop_last=drop_last, micro_batches=micro_batches)
        self.orders = tuple(orders)
        self.slots = _whole_parts(shares, PATTERN_LENGTH)
        self._firsts = np.concatenate([[0], np.cumsum([order.num_samples for order in orders])])
        self._pattern = np.repeat(np.arange(len(orders)), self.slots)

    def take(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        return self._at(epoch * self.num_samples + positions).indices

    def _visit(self, epoch: int, positions: np.ndarray, batch_size: int) -> Visits:
        shown = self.num_samples // batch_size * batch_size if self.drop_last else self.num_samples
        return self._at(epoch * shown + positions)

    def _at(self, positions: np.ndarray) -> Visits:
        """Visits at positions counted from the beginning of the run."""
        indices, passes = np.empty(len(positions), dtype=np.int64), np.empty(len(positions), dtype=np.int64)
        rounds, slots = np.divmod(positions, PATTERN_LENGTH)
        for number in np.unique(rounds):
            here = rounds == number
            pattern = self._pattern[random_permutation(PATTERN_LENGTH, self.seed, int(number), 1)]
            for source in np.unique(pattern[slots[here]]):
                earlier = np.cumsum(pattern == source) - 1
                rows = np.flatnonzero(here)[pattern[slots[here]] == source]
                own = int(number) * int(self.slots[source]) + earlier[slots[rows]]
                indices[rows], passes[rows] = self._of_source(int(source), own)
        return Visits(indices, passes)

    def _of_source(self, source: int, positions: np.ndarray) -> Visits:
        order = self.orders[source]
        passes, within = np.divmod(positions, order.num_samples)
        indices = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(passes):
            rows = passes == number
            indices[rows] = order.take(int(number), within[rows])
        return Visits(indices + self._firsts[source], passes)


def make_order(
    source: SampleSource,
    seed: int,
    *,
    drop_last: bool = True,
    micro_batches: int = 1,
    window_blocks: int = 64,
    by_blocks: bool | None = None,
) -> SampleOrder:
    """The order that fits a source: by blocks where it is remote, of single samples otherwise; mixed as it says.

    by_blocks: for shards, True or False decides instead.
    """
    if isinstance(source, MixedSource):
        options = {"window_blocks": window_blocks, "by_blocks": by_blocks}
        orders = [make_order(part, _own_seed(seed, n), **options) for n, part in enumerate(source.sources)]
        return MixedOrder(orders, source.shares, seed, drop_last=drop_last, micro_batches=micro_batches)
    starts = source.block_starts
    if starts is not None and (source.is_remote if by_blocks is None else by_blocks):
        return BlockOrder(
            len(source), seed, starts, window_blocks=window_blocks, drop_last=drop_last, micro_batches=micro_batches
        )
    return EpochOrder(len(source), seed, drop_last=drop_last, micro_batches=micro_batches)


def _own_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _whole_parts(shares: np.ndarray, total: int) -> np.ndarray:
    """`total` divided in proportion to `shares`: (K,) int64 by largest remainder; every source gets 1 at least."""
    if len(shares) > total:
        raise ValueError(f"there are {len(shares)} sources of data; more than {total} cannot be mixed")
    exact = np.asarray(shares, dtype=np.float64) * total
    parts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while parts.sum() != total:
        step = 1 if parts.sum() < total else -1
        error = np.where((parts + step < 1), -np.inf, step * (exact - parts))
        parts[np.argmax(error)] += step
    return parts
