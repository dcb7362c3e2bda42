import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoca.data import BlockOrder, EpochOrder, MixedOrder
from opencoca.data.mixture import PATTERN_LENGTH


def block_order(sizes, seed=0, **options):
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return BlockOrder(int(np.sum(sizes)), seed, starts, **options)


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=30)


@given(SIZES, st.integers(1, 8), st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_is_a_permutation(sizes, window, seed, epoch):
    order = block_order(sizes, seed, window_blocks=window)
    assert sorted(order.take(epoch, np.arange(sum(sizes))).tolist()) == list(range(sum(sizes)))


@given(SIZES, st.integers(1, 8), st.data())
def test_each_position_is_the_same_however_it_is_asked_for(sizes, window, data):
    total = sum(sizes)
    whole = block_order(sizes, 3, window_blocks=window).take(2, np.arange(total))
    order = block_order(sizes, 3, window_blocks=window)
    for position in data.draw(st.lists(st.integers(0, total - 1), max_size=10)):
        order.take(data.draw(st.integers(0, 3)), np.array([position]))  # nothing is remembered
        assert order.take(2, np.array([position]))[0] == whole[position]


@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_ranks_and_micro_batches_together_see_what_one_sees(sizes, per_rank, world_size, micro_batches):
    order = block_order(sizes, window_blocks=4, drop_last=False, micro_batches=micro_batches)
    one = block_order(sizes, window_blocks=4, drop_last=False)
    batch_size = per_rank * world_size
    for step in range(order.steps_per_epoch(batch_size)):
        parts = [order.batch(1, step, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(parts)) == sorted(one.batch(1, step, batch_size))


def test_few_blocks_are_in_use_at_a_time():
    """A cache of two windows sees each block fetched once: what makes reading from afar efficient."""
    order = block_order([100] * 200, window_blocks=8)
    blocks = order.take(0, np.arange(20_000)) // 100
    last_use = {block: position for position, block in enumerate(blocks.tolist())}
    in_use, most = set(), 0
    for position, block in enumerate(blocks.tolist()):
        in_use.add(block)
        most = max(most, len(in_use))
        if last_use[block] == position:
            in_use.discard(block)
    assert most <= 8


def test_epochs_and_seeds_differ_and_mix():
    orders = [block_order([10] * 60, seed).take(epoch, np.arange(600)) for seed in range(3) for epoch in range(3)]
    agreement = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreement) < 0.03
    neighbours = np.mean([np.abs(np.diff(order)) == 1 for order in orders])
    assert neighbours < 0.05
    first_half = np.mean([np.isin(np.arange(60), block_order([2] * 30, s).take(0, np.arange(30))) for s in range(300)])
    assert abs(first_half - 0.5) < 0.05


def test_mistakes():
    with pytest.raises(ValueError, match="window_blocks must be 1 or more, got 0"):
        block_order([3], window_blocks=0)
    with pytest.raises(ValueError, match="epoch must be 0 or more"):
        block_order([3]).take(-1, np.arange(3))


# mixtures


def mixed(sizes, shares, seed=0, **options):
    orders = [EpochOrder(size, seed + number) for number, size in enumerate(sizes)]
    return MixedOrder(orders, np.array(shares) / np.sum(shares), seed, **options)


def run_of(order, batch_size, num_epochs):
    """All visits of a run, joined."""
    steps = range(order.steps_per_epoch(batch_size))
    visits = [order.visits(epoch, step, batch_size) for epoch in range(num_epochs) for step in steps]
    return np.concatenate([v.indices for v in visits]), np.concatenate([v.passes for v in visits])


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.data(),
    st.integers(1, 16),
    st.booleans(),
)
def test_every_source_is_passed_through_whole_before_it_repeats(sizes, data, batch_size, drop_last):
    shares = [data.draw(st.floats(0.05, 5)) for _ in sizes]
    order = mixed(sizes, shares, drop_last=drop_last)
    if drop_last and batch_size > order.num_samples:
        return
    indices, passes = run_of(order, batch_size, 4)
    firsts = np.concatenate([[0], np.cumsum(sizes)])
    for source, size in enumerate(sizes):
        own = (indices >= firsts[source]) & (indices < firsts[source + 1])
        seen, number = indices[own] - firsts[source], passes[own]
        for start in range(0, len(seen), size):
            piece = seen[start : start + size]
            assert len(set(piece.tolist())) == len(piece)
            assert (number[start : start + size] == start // size).all()


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 99))
def test_shares_are_kept_in_every_stretch(shares, seed):
    sizes = [500] * len(shares)
    order = mixed(sizes, shares, seed)
    assert order.slots.sum() == PATTERN_LENGTH
    assert (order.slots >= 1).all()
    exact = np.array(shares) / sum(shares) * PATTERN_LENGTH
    assert (np.abs(order.slots - exact) < 1 + (exact < 1).sum()).all()
    for start in (0, PATTERN_LENGTH, 7 * PATTERN_LENGTH):
        indices = order._at(np.arange(start, start + PATTERN_LENGTH)).indices
        np.testing.assert_array_equal(np.bincount(indices // 500, minlength=len(shares)), order.slots)


def test_ranks_see_what_one_process_sees():
    one, batch_size = mixed([40, 25], [1, 2]), 12
    for step in range(one.steps_per_epoch(batch_size)):
        whole = one.visits(1, step, batch_size)
        for world_size in (2, 3, 4):
            parts = [
                mixed([40, 25], [1, 2]).visits(1, step, batch_size, rank=r, world_size=world_size)
                for r in range(world_size)
            ]
            np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
            np.testing.assert_array_equal(np.concatenate([part.passes for part in parts]), whole.passes)


def test_too_many_sources():
    with pytest.raises(ValueError, match="more than 1024 cannot be mixed"):
        mixed([1] * 1025, [1.0] * 1025)
