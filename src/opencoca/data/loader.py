"""Training batches: samples with some of their texts, from any (epoch, step) on.

The content of a batch is a pure function of (source, seed, epoch, step): it depends neither on the number of workers,
nor on earlier batches or interruptions of the run. Letters: C texts per sample, F images per sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from opencoca.data.batch import Batch
from opencoca.data.batch_dataset import BatchDataset, EncodeTarget, MadeBatch, Position
from opencoca.data.captions import CaptionsOnDemand, CaptionTokenizer, TokenizedCaptions
from opencoca.data.order import SampleOrder
from opencoca.data.quarantine import MAX_BAD_SHARE, Quarantine
from opencoca.data.source import SampleSource
from opencoca.data.transforms import TrainTransform


class TrainingLoader:
    """Batches of samples with `texts_per_sample` texts each, prefetched by worker processes.

    Which texts a sample shows, how its images are cropped and whether they are mirrored are drawn anew in every epoch,
    from (seed, epoch, index of the sample) alone. An image is never mirrored while it shows a caption that speaks of
    left or right. A sample that can't be decoded, or lacks a text or target where one is needed, is replaced by the
    next good one of the source, with one warning per file and a line in the quarantine. A remote read that fails for
    good stops the run instead.

    Args:
        source: the samples.
        tokenizer: see `CaptionTokenizer`; captions in memory are tokenised once, here, others with their image. Not
            needed without texts.
        transform: decodes and augments. With `load_pixels=False` only its flip_probability counts (None: no mirroring).
        order: which samples make up a batch.
        batch_size: samples per step over all processes; a multiple of `world_size`.
        texts_per_sample: C; a sample with fewer shows some of them again. 0 for no texts.
        context_length: most token ids a caption may have.
        seed: 0 or more.
        num_workers: processes that prefetch; 0 works in the caller's, as does `load_pixels=False`.
        images_per_sample: F; a sample with another number is a bad one.
        encode_target: makes a target a row of `Batch.targets`, in the workers; a sample without a target, or with one
            that it refuses (ValueError), is bad. None for no targets.
        load_pixels: whether to decode images; not needed if features of theirs are cached.
        skip: indices of images known to be unusable; replaced without a warning, and not counted as broken.
        rank, world_size: this process's part of each batch.
        pin_memory: whether batches lie in page-locked memory, for faster copies to a GPU.
        quarantine: JSON-lines file that lists bad samples; None for none.
        max_bad_share: of the samples, that may be bad.

    Raises:
        ValueError: no captions at all, or none for more than `max_bad_share` of the images; an order for another
            number of images; while iterating, when more than `max_bad_share` of the images turn out to be bad.
        RemoteReadError: while iterating, when a remote file cannot be read.
    """

    def __init__(
        self,
        source: SampleSource,
        tokenizer: CaptionTokenizer | None,
        transform: TrainTransform | None,
        order: SampleOrder,
        batch_size: int,
        texts_per_sample: int,
        context_length: int,
        seed: int,
        num_workers: int = 0,
        *,
        images_per_sample: int = 1,
        encode_target: EncodeTarget | None = None,
        load_pixels: bool = True,
        skip: Collection[int] = (),
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        quarantine: Path | None = None,
        max_bad_share: float = MAX_BAD_SHARE,
    ):
        if order.num_samples != len(source):
            raise ValueError(f"the order is for {order.num_samples} images, the source has {len(source)}")
        if texts_per_sample < 0:
            raise ValueError(f"texts_per_sample must be 0 or more, got {texts_per_sample}")
        if load_pixels and transform is None:
            raise ValueError("a transform is needed to load pixels")
        order.batch(0, 0, batch_size, rank=rank, world_size=world_size)  # unusable sizes fail here, not in a worker
        unusable, captions = np.zeros(len(source), dtype=bool), None
        if texts_per_sample:
            assert tokenizer is not None, "texts need a tokenizer"
            if source.captions_in_memory:
                captions = TokenizedCaptions(source, tokenizer, context_length)
                unusable = captions.counts() == 0
                _check_captions(source, unusable, max_bad_share)
            else:
                captions = CaptionsOnDemand(source, tokenizer, context_length)
        unusable[list(skip)] = True
        if unusable.all():
            raise ValueError("no image is left to train on: each has no caption or is to be skipped")
        self.order = order
        self.batch_size = batch_size
        self.num_workers = num_workers if load_pixels else 0
        self.pin_memory = pin_memory
        self.quarantine = Quarantine(len(source), quarantine, max_bad_share)
        self.quarantine.note_lost(source, write=rank == 0)
        self._served = 0
        self._dataset = BatchDataset(
            source=source,
            captions=captions,
            pad_id=tokenizer.pad_id if tokenizer is not None else 0,
            transform=transform,
            order=order,
            batch_size=batch_size,
            texts_per_sample=texts_per_sample,
            images_per_sample=images_per_sample,
            encode_target=encode_target,
            seed=seed,
            load_pixels=load_pixels,
            unusable=unusable,
            rank=rank,
            world_size=world_size,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return self.order.steps_per_epoch(self.batch_size)

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch at one position, made in the caller's process."""
        return self._account(self._dataset[(epoch, step)])

    def batches(self, epoch: int = 0, step: int = 0, *, stop_epoch: int | None = None) -> Iterator[Batch]:
        """Batches from a position on, epoch after epoch, until `stop_epoch` would begin (None: endlessly)."""
        loader = DataLoader(
            self._dataset,
            batch_size=None,  # the dataset makes whole batches
            sampler=_positions(self.steps_per_epoch, epoch, step, stop_epoch),  # pyright: ignore[reportArgumentType]
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            # Without one of its own, the loader would draw from the global generator, and with it change whatever
            # dropout draws next: a resumed run would part from an uninterrupted one.
            generator=torch.Generator(),
        )
        for item in loader:
            batch = self._account(item)
            yield batch.pin_memory() if self.pin_memory else batch

    def _account(self, item: MadeBatch | Exception) -> Batch:
        """Note newly found bad samples, and raise ValueError if there are too many."""
        if isinstance(item, Exception):
            raise item
        self._served += len(item.batch.keys)
        self.quarantine.add(item.bad)
        self.quarantine.check(self._served)
        return item.batch


def _check_captions(source: SampleSource, without: np.ndarray, max_share: float) -> None:
    if not without.any():
        return
    if without.all():
        raise ValueError(f"none of the {len(source)} images has a caption to train on")
    first = source.key(int(np.argmax(without)))
    message = f"{int(without.sum())} of {len(source)} images have no caption, for example {first!r}"
    if without.mean() > max_share:
        raise ValueError(f"{message}; that is more than {max_share:.0%}, remove them or add their captions")
    warnings.warn(f"{message}; other images take their places", stacklevel=3)


def _unchanged(item: Any) -> Any:
    return item


def _positions(steps_per_epoch: int, epoch: int, step: int, stop_epoch: int | None) -> Iterator[Position]:
    """(epoch, step) after (epoch, step), from one on."""
    if epoch < 0 or not 0 <= step <= steps_per_epoch:
        raise ValueError(f"there is no step {step} of {steps_per_epoch} in epoch {epoch} to begin at")
    while stop_epoch is None or epoch < stop_epoch:
        for later in range(step, steps_per_epoch):
            yield epoch, later
        epoch, step = epoch + 1, 0
