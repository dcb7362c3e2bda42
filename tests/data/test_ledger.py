"""Exactly once: what a run sees over three epochs, with kills and other numbers of workers and ranks on the way."""

import itertools
import json
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest

from processes import kill, start

from .run_ledger import BATCH_SIZE, NUM_EPOCHS, make_loader, run
from .test_shards import sample, write_tar

NUM_SAMPLES = 50


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    bounds = [0, 13, 30, NUM_SAMPLES]
    for shard, (first, end) in enumerate(itertools.pairwise(bounds)):
        write_tar(folder / f"{shard}.tar", [member for number in range(first, end) for member in sample(number)])
    return str(folder)


def whole_steps(folder, start, world_size):
    """What all ranks together have finished from `start` on, as [(keys, sum of pixels)]; torn lines don't count."""
    ranks = []
    for rank in range(world_size):
        path = folder / f"{start}-{rank}-of-{world_size}.jsonl"
        text = path.read_text() if path.exists() else ""
        ranks.append([json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")])
    joined = []
    for rows in zip(*ranks, strict=False):
        assert len({step for step, _, _ in rows}) == 1
        joined.append(([key for _, keys, _ in rows for key in keys], sum(total for _, _, total in rows)))
    return joined


def run_with_kills(folder, shards, kind, total_steps, seed):
    """Runs to the end, killed at random; each start has another number of ranks and workers."""
    draw, seen, kills = random.Random(seed), [], 0
    while len(seen) < total_steps:
        world_size, num_workers = draw.choice([(1, 0), (2, 1), (3, 0), (4, 1), (1, 2), (2, 0)])
        (folder / "start").write_text(str(len(seen)))
        processes = [
            start(run, folder, shards, rank, world_size, num_workers, kind, output=folder / f"rank-{rank}.txt")
            for rank in range(world_size)
        ]
        begin, until = len(seen), len(seen) + draw.randint(1, 5)
        deadline = time.monotonic() + 120
        while any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, "a run hangs"
            if begin + len(whole_steps(folder, begin, world_size)) >= until:
                for process in processes:
                    if process.is_alive():
                        kill(process)
                        kills += 1
            time.sleep(0.01)
        assert all(process.exitcode in (0, -signal.SIGKILL) for process in processes)
        seen += whole_steps(folder, begin, world_size)
    return seen[:total_steps], kills


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind",
    ["blocks", pytest.param("samples", marks=pytest.mark.slow), pytest.param("mixed", marks=pytest.mark.slow)],
)
def test_nothing_is_lost_or_doubled(tmp_path, shards, kind):
    loader = make_loader(shards, kind, 0, 1, 0)
    expected = [(list(batch.keys), float(batch.images.sum())) for batch in loader.batches(stop_epoch=NUM_EPOCHS)]
    seen, kills = run_with_kills(tmp_path, shards, kind, len(expected), seed=7)
    assert kills >= 3
    assert [keys for keys, _ in seen] == [keys for keys, _ in expected], "another global order"
    np.testing.assert_allclose([total for _, total in seen], [total for _, total in expected], rtol=1e-4, atol=1e-2)
    counts = Counter(key for keys, _ in seen for key in keys)
    assert sum(counts.values()) == NUM_EPOCHS * NUM_SAMPLES
    if kind != "mixed":  # there, some sources are passed through more often than others
        assert set(counts.values()) == {NUM_EPOCHS}
        steps = -(-NUM_SAMPLES // BATCH_SIZE)
        for epoch in range(NUM_EPOCHS):
            keys = [key for own, _ in seen[epoch * steps : (epoch + 1) * steps] for key in own]
            assert len(keys) == len(set(keys)) == NUM_SAMPLES
