"""A run that only notes which samples it saw. It goes on where its ledger ends, and can be killed at any time."""

from __future__ import annotations

import json
import os
from pathlib import Path

from opencoca.data import (
    MixedSource,
    PreprocessConfig,
    ShardStorage,
    TarShards,
    TrainingLoader,
    TrainTransform,
    find_shards,
    make_order,
)

BATCH_SIZE, NUM_EPOCHS, SEED = 12, 3, 4


class NumberTokenizer:
    pad_id = 0

    def encode_batch(self, texts: list[str], context_length: int) -> list[list[int]]:
        return [[1 + sum(text.encode()) % 1000] for text in texts]


def make_loader(shards: str, kind: str, rank: int, world_size: int, num_workers: int) -> TrainingLoader:
    source = TarShards(find_shards(shards), storage=ShardStorage(block_samples=4))
    if kind == "mixed":
        halves = [TarShards([path], storage=ShardStorage(block_samples=4)) for path in source.shards]
        source = MixedSource(halves, [1 + number for number in range(len(halves))])
    order = make_order(source, SEED, drop_last=False, by_blocks=kind == "blocks", window_blocks=3)
    transform = TrainTransform(PreprocessConfig(image_size=(8, 8)))
    options = {"num_workers": num_workers, "rank": rank, "world_size": world_size}
    return TrainingLoader(source, NumberTokenizer(), transform, order, BATCH_SIZE, 1, 8, SEED, **options)


def run(folder: Path, shards: str, rank: int, world_size: int, num_workers: int, kind: str) -> None:
    """Takes the steps of one of ``world_size`` processes."""
    loader = make_loader(shards, kind, rank, world_size, num_workers)
    start = int((folder / "start").read_text())
    with open(folder / f"{start}-{rank}-of-{world_size}.jsonl", "a") as ledger:
        step = start
        for batch in loader.batches(*divmod(start, loader.steps_per_epoch), stop_epoch=NUM_EPOCHS):
            ledger.write(json.dumps([step, batch.keys, float(batch.images.sum() if batch.keys else 0)]) + "\n")
            ledger.flush()
            os.fsync(ledger.fileno())
            step += 1
