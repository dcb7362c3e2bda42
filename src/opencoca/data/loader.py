"""Training batches: samples with some of their texts, from any (epoch, step) on.

The content of a batch is a pure function of (source, seed, epoch, step): it depends neither on the number of workers,
nor on earlier batches or interruptions of the run. Letters: C texts per sample, F images per sample.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from opencoca.data.batch import Batch
from opencoca.data.captions import (
    CaptionsOnDemand,
    CaptionTokenizer,
    ShownCaptions,
    TokenizedCaptions,
    collate_captions,
)
from opencoca.data.order import SampleOrder
from opencoca.data.quarantine import MAX_BAD_SHARE, Quarantine
from opencoca.data.read_ahead import parallel_map
from opencoca.data.remote import RemoteReadError
from opencoca.data.source import BadSample, Sample, SampleSource
from opencoca.data.targets import Target
from opencoca.data.transforms import TrainTransform, normalize
from opencoca.system.notice import Notice

Position = tuple[int, int]
EncodeTarget = Callable[[Target], np.ndarray | int | float]
"""A target as a row of `Batch.targets`; raises ValueError for one that the task can't use."""

_MAX_BROKEN_IN_A_ROW = 1000
_READING_THREADS = 16


class MadeBatch(NamedTuple):
    """A batch, and the bad samples met on the way to it, by index."""

    batch: Batch
    bad: dict[int, BadSample]


class _Loaded(NamedTuple):
    index: int
    mirrored: bool
    token_ids: list[np.ndarray]
    images: list[np.ndarray]  # each (H, W, 3) uint8
    target: np.ndarray | None


@dataclass(eq=False)
class TrainingLoader(Dataset):
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

    The bad ones that were met so far are in `bad_samples.by_index`.

    Raises:
        ValueError: no captions at all, or none for more than `max_bad_share` of the images; an order for another
            number of images; while iterating, when more than `max_bad_share` of the images turn out to be bad.
        RemoteReadError: while iterating, when a remote file cannot be read.
    """

    source: SampleSource
    tokenizer: CaptionTokenizer | None
    transform: TrainTransform | None
    order: SampleOrder
    batch_size: int
    texts_per_sample: int
    context_length: int
    seed: int
    num_workers: int = 0
    _: KW_ONLY
    images_per_sample: int = 1
    encode_target: EncodeTarget | None = None
    load_pixels: bool = True
    skip: Collection[int] = ()
    rank: int = 0
    world_size: int = 1
    pin_memory: bool = False
    quarantine: Path | None = None
    max_bad_share: float = MAX_BAD_SHARE

    def __post_init__(self) -> None:
        source, order = self.source, self.order
        if order.num_samples != len(source):
            raise ValueError(f"the order is for {order.num_samples} images, the source has {len(source)}")
        if self.texts_per_sample < 0:
            raise ValueError(f"texts_per_sample must be 0 or more, got {self.texts_per_sample}")
        if self.load_pixels and self.transform is None:
            raise ValueError("a transform is needed to load pixels")
        order.batch(0, 0, self.batch_size, **self._share)  # unusable sizes fail here, not in a worker
        self._unusable = np.zeros(len(source), dtype=bool)
        self._captions = self._open_captions()
        self._unusable[list(self.skip)] = True
        if self._unusable.all():
            raise ValueError("no image is left to train on: each has no caption or is to be skipped")
        # What is read of a sample: captions that are tokenised already are not read again.
        self._wanted = {
            "images": self.load_pixels,
            "texts": isinstance(self._captions, CaptionsOnDemand),
            "target": self.encode_target is not None,
        }
        self._bad: dict[int, BadSample] = {}  # the ones that this process met
        self._served = 0
        self.bad_samples = Quarantine(len(source), self.quarantine, self.max_bad_share)
        self.bad_samples.note_lost(source, write=self.rank == 0)

    def _open_captions(self) -> TokenizedCaptions | CaptionsOnDemand | None:
        """Prepares the captions, and notes which images have none."""
        if not self.texts_per_sample:
            return None
        assert self.tokenizer is not None, "texts need a tokenizer"
        if not self.source.captions_in_memory:
            return CaptionsOnDemand(self.source, self.tokenizer, self.context_length)
        captions = TokenizedCaptions(self.source, self.tokenizer, self.context_length)
        self._unusable = captions.counts() == 0
        _check_captions(self.source, self._unusable, self.max_bad_share)
        return captions

    @property
    def _share(self) -> dict[str, int]:
        return {"rank": self.rank, "world_size": self.world_size}

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return self.order.steps_per_epoch(self.batch_size)

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch at one position, made in the caller's process."""
        return self._account(self[epoch, step])

    def batches(self, epoch: int = 0, step: int = 0, *, stop_epoch: int | None = None) -> Iterator[Batch]:
        """Batches from a position on, epoch after epoch, until `stop_epoch` would begin (None: endlessly)."""
        loader = DataLoader(
            self,
            batch_size=None,  # each item is a whole batch
            sampler=_positions(self.steps_per_epoch, epoch, step, stop_epoch),  # pyright: ignore[reportArgumentType]
            num_workers=self.num_workers if self.load_pixels else 0,
            collate_fn=_unchanged,
            worker_init_fn=_leave_signals_to_parent,
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
        self.bad_samples.add(item.bad)
        self.bad_samples.check(self._served)
        return item.batch

    def __getitem__(self, position: Position) -> MadeBatch | Exception:
        """The batch. In a worker process an error is returned, as PyTorch would wrap its message in a traceback."""
        epoch, step = position
        try:
            wanted = self.order.visits(epoch, step, self.batch_size, **self._share)
            if not len(wanted.indices):
                # A process whose share of the step is empty gives the others' kind of batch all the same.
                whole = self.order.visits(epoch, step, self.batch_size, rank=0, world_size=1)
                sample = self._load_or_next(int(whole.indices[0]), int(whole.passes[0]), {}, {})
                return MadeBatch(self._collate([sample]).split(2)[1], {})
            read_ahead = self._read_ahead(wanted.indices) if self.source.is_remote and self.load_pixels else {}
            visits = zip(wanted.indices.tolist(), wanted.passes.tolist(), strict=True)
            bad: dict[int, BadSample] = {}
            samples = [self._load_or_next(index, number, read_ahead, bad) for index, number in visits]
            return MadeBatch(self._collate(samples), bad)
        except (ValueError, OSError, ImportError) as error:
            if get_worker_info() is None:
                raise
            return error

    def _collate(self, samples: list[_Loaded]) -> Batch:
        token_ids, token_mask = collate_captions(
            [ids for sample in samples for ids in sample.token_ids],
            self.tokenizer.pad_id if self.tokenizer is not None else 0,
        )
        images = None
        if self.load_pixels:
            assert self.transform is not None
            images = normalize(np.stack([image for s in samples for image in s.images]), self.transform.config)
        targets = [sample.target for sample in samples if sample.target is not None]
        sample_ids = [sample.index for sample in samples]
        return Batch(
            sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
            images=images,
            token_ids=token_ids,
            token_mask=token_mask,
            targets=torch.from_numpy(np.stack(targets)) if targets else None,
            mirrored=torch.tensor([sample.mirrored for sample in samples], dtype=torch.bool),
            keys=tuple(map(self.source.key, sample_ids)),
            images_per_sample=self.images_per_sample,
        )

    def _read_ahead(self, indices: np.ndarray) -> dict[int, Sample | Exception]:
        """Reads remote samples of the batch: many requests at a time, as each takes long."""
        good = [index for index in dict.fromkeys(indices.tolist()) if index not in self._bad]

        def read(index: int) -> Sample | Exception:
            try:
                return self.source.read(index, **self._wanted)
            except (ValueError, OSError) as error:
                return error

        return dict(zip(good, parallel_map(read, good, _READING_THREADS, 2 * _READING_THREADS), strict=True))

    def _load_or_next(
        self, index: int, number: int, read_ahead: dict[int, Sample | Exception], bad: dict[int, BadSample]
    ) -> _Loaded:
        """The sample `index`, or the next good one of the source; those that turn out to be bad are put into `bad`."""
        failed: list[BadSample] = []
        for ahead in range(len(self.source)):
            candidate = (index + ahead) % len(self.source)
            if self._unusable[candidate]:
                continue
            try:
                if candidate not in self._bad:
                    return self._load(candidate, number, read_ahead.get(candidate))
            except RemoteReadError:  # the sample may be good; without it, the run would not be the same
                raise
            except (ValueError, OSError) as error:
                file, offset = self.source.place(candidate)
                self._bad[candidate] = BadSample(self.source.key(candidate), file, offset, str(error))
            bad[candidate] = self._bad[candidate]
            failed.append(bad[candidate])
            if len(failed) >= _MAX_BROKEN_IN_A_ROW:
                break
        raise ValueError(f"{len(failed)} images in a row are broken: {failed[0].reason}")

    def _load(self, index: int, number: int, read: Sample | Exception | None) -> _Loaded:
        if isinstance(read, Exception):
            raise read
        key, sample = self.source.key(index), self.source.read(index, **self._wanted) if read is None else read
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, number, index]))
        chance = bits.random_raw() / 2**64
        shown = ShownCaptions([], False)
        if self._captions is not None:
            shown = self._captions.show(index, sample, self.texts_per_sample, bits)
            if shown is None:
                raise ValueError(f"the image {key!r} has no caption")
        target = None if self.encode_target is None else self._encode(key, sample)
        flip_probability = self.transform.flip_probability if self.transform is not None else 0.0
        mirrored = bool(chance < flip_probability and not shown.mention_side)
        images = self._decode(key, sample, bits, mirrored) if self.load_pixels else []
        return _Loaded(index, mirrored, shown.token_ids, images, target)

    def _encode(self, key: str, sample: Sample) -> np.ndarray:
        assert self.encode_target is not None
        if sample.target is None:
            raise ValueError(f"the image {key!r} has no label")
        try:
            return np.asarray(self.encode_target(sample.target))
        except ValueError as error:
            raise ValueError(f"the image {key!r}: {error}") from error

    def _decode(self, key: str, sample: Sample, bits: np.random.PCG64, mirrored: bool) -> list[np.ndarray]:
        assert self.transform is not None
        if len(sample.images) != self.images_per_sample:
            raise ValueError(f"the sample {key!r} has {len(sample.images)} images instead of {self.images_per_sample}")
        rng = np.random.Generator(bits)
        return [self.transform.decode_uint8(data, rng, flip=mirrored, name=key) for data in sample.images]


def _check_captions(source: SampleSource, without: np.ndarray, max_share: float) -> None:
    if not without.any():
        return
    if without.all():
        raise ValueError(f"none of the {len(source)} images has a caption to train on")
    first = source.key(int(np.argmax(without)))
    message = f"{int(without.sum())} of {len(source)} images have no caption, for example {first!r}"
    if without.mean() > max_share:
        raise ValueError(f"{message}; that is more than {max_share:.0%}, remove them or add their captions")
    warnings.warn(f"{message}; other images take their places", Notice, stacklevel=5)


def _unchanged(item: Any) -> Any:
    return item


def _leave_signals_to_parent(worker: int) -> None:
    """Lets only its parent end this worker: Ctrl-C and schedulers ask every process, and the parent needs its batches.

    Without POSIX's ``sigwaitinfo``, which tells who sent a signal, SIGTERM ends the worker as usual.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_asks, args=(os.getppid(),), daemon=True).start()


def _end_when_parent_asks(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _positions(steps_per_epoch: int, epoch: int, step: int, stop_epoch: int | None) -> Iterator[Position]:
    """(epoch, step) after (epoch, step), from one on."""
    if epoch < 0 or not 0 <= step <= steps_per_epoch:
        raise ValueError(f"there is no step {step} of {steps_per_epoch} in epoch {epoch} to begin at")
    while stop_epoch is None or epoch < stop_epoch:
        yield from ((epoch, later) for later in range(step, steps_per_epoch))
        epoch, step = epoch + 1, 0
