import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoca.data import EpochOrder


def whole(order, epoch):
    """The order of a whole epoch."""
    return order.take(epoch, np.arange(order.num_samples))


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epoch_is_a_permutation(num_samples, seed, epoch):
    indices = whole(EpochOrder(num_samples, seed), epoch)
    assert indices.dtype == np.int64
    assert sorted(indices) == list(range(num_samples))


@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 9), st.booleans())
def test_batches_joined_are_the_epoch(num_samples, batch_size, seed, drop_last):
    order = EpochOrder(num_samples, seed, drop_last=drop_last)
    if drop_last and batch_size > num_samples:
        with pytest.raises(ValueError, match=f"a batch of {batch_size} samples is more than the {num_samples}"):
            order.steps_per_epoch(batch_size)
        return
    steps = order.steps_per_epoch(batch_size)
    joined = np.concatenate([order.batch(4, step, batch_size) for step in range(steps)])
    kept = num_samples // batch_size * batch_size if drop_last else num_samples
    np.testing.assert_array_equal(joined, whole(order, 4)[:kept])
    with pytest.raises(ValueError, match="step must be in"):
        order.batch(4, steps, batch_size)


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_ranks_together_see_what_one_sees(num_samples, per_rank, world_size, drop_last):
    batch_size = per_rank * world_size
    order = EpochOrder(num_samples, 3, drop_last=drop_last)
    if drop_last and batch_size > num_samples:
        return
    for step in range(order.steps_per_epoch(batch_size)):
        parts = [order.batch(1, step, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), order.batch(1, step, batch_size))
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 1
        assert not drop_last or sizes == {per_rank}


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_ranks_share_out_every_micro_batch(num_samples, per_rank, world_size, micro_batches):
    batch_size = per_rank * world_size
    order = EpochOrder(num_samples, 3, drop_last=False, micro_batches=micro_batches)
    for step in range(order.steps_per_epoch(batch_size)):
        whole, sizes = order.batch(0, step, batch_size), order.micro_batch_sizes(step, batch_size)
        assert sum(sizes) == len(whole)
        assert len(sizes) == micro_batches
        assert max(sizes) - min(sizes) <= 1
        parts = []
        for rank in range(world_size):
            share = {"rank": rank, "world_size": world_size}
            own = order.micro_batch_sizes(step, batch_size, **share)
            parts.append(np.split(order.batch(0, step, batch_size, **share), np.cumsum(own)[:-1]))
        for part, expected in enumerate(np.split(whole, np.cumsum(sizes)[:-1])):
            np.testing.assert_array_equal(np.concatenate([own[part] for own in parts]), expected)


def test_position_alone_decides():
    order = EpochOrder(1000, seed=7)
    later = order.batch(5, 3, 32).copy()
    order.batch(0, 0, 32)
    np.testing.assert_array_equal(order.batch(5, 3, 32), later)
    np.testing.assert_array_equal(EpochOrder(1000, seed=7).batch(5, 3, 32), later)


def test_seeds_and_epochs_differ_and_mix():
    orders = [whole(EpochOrder(1000, seed), epoch) for seed in range(4) for epoch in range(4)]
    agreement = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreement) < 0.01
    # Every sample is as likely in the first half as in the second.
    firsts = np.mean([np.isin(np.arange(100), whole(EpochOrder(100, s), 0)[:50]) for s in range(400)], axis=0)
    assert abs(firsts - 0.5).max() < 0.13


def test_drop_last_leaves_different_samples_out():
    order = EpochOrder(10, seed=0)
    left_out = {int(whole(order, epoch)[-1]) for epoch in range(20)}
    assert order.steps_per_epoch(3) == 3
    assert EpochOrder(10, seed=0, drop_last=False).steps_per_epoch(3) == 4
    assert len(left_out) > 3


def test_mistakes():
    with pytest.raises(ValueError, match="num_samples must be 1 or more, got 0"):
        EpochOrder(0, 0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        EpochOrder(5, -1)
    order = EpochOrder(10, 0)
    with pytest.raises(ValueError, match="epoch must be 0 or more"):
        order.take(-1, np.arange(3))
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        order.steps_per_epoch(0)
    with pytest.raises(ValueError, match="rank must be in"):
        order.batch(0, 0, 4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="a batch of 5 samples can't be divided between 2 processes"):
        order.batch(0, 0, 5, world_size=2)
