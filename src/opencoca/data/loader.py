"""Training batches: images with some of their captions, from any (epoch, step) on.

What a batch holds is a pure function of (source, seed, epoch, step): not of the number of workers, of earlier batches,
or of how often the run was interrupted. Letters: I images, C captions per image, T token positions, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from opencoca.data.captions import CaptionTokenizer, TokenizedCaptions, choose_captions, collate_captions
from opencoca.data.images import ImageError
from opencoca.data.order import EpochOrder
from opencoca.data.sources import ImageTextSource
from opencoca.data.transforms import TrainTransform

MAX_BROKEN_SHARE = 0.1
# Only after this many images is a share of broken ones taken seriously (or after all, if there are fewer).
_MIN_IMAGES_TO_JUDGE = 100
_MAX_BROKEN_IN_A_ROW = 1000


@dataclass(frozen=True)
class CaptionBatch:
    """Images and captions of one step, on one process. Text row r belongs to image r // C.

    Attributes:
        image_ids: (I,) int64, each image's index in the source.
        pixels: (I, 3, H, W) float32, or None where cached features take their place.
        mirrored: (I,) bool, whether `pixels` are mirrored left to right (without pixels: whether features should be).
        token_ids: (I * C, T) int64, padded to the longest caption of the batch.
        token_mask: (I * C, T) bool, True where a token is real.
        keys: the images' names.
    """

    image_ids: torch.Tensor
    pixels: torch.Tensor | None
    mirrored: torch.Tensor
    token_ids: torch.Tensor
    token_mask: torch.Tensor
    keys: tuple[str, ...]

    @property
    def captions_per_image(self) -> int:
        """C."""
        return len(self.token_ids) // max(1, len(self.image_ids))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CaptionBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CaptionBatch:
        """The same batch with its tensors in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> CaptionBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return CaptionBatch(**{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


Position = tuple[int, int]
BrokenImage = tuple[int, str]


class TrainingLoader:
    """Batches of images with `captions_per_image` captions each, prefetched by worker processes.

    Which captions an image shows, how it is cropped and whether it is mirrored are drawn anew in every epoch, from
    (seed, epoch, index of the image) alone. An image is never mirrored while it shows a caption that speaks of left or
    right. An image that can't be decoded, or has no caption, is replaced by the next good one of the source, with one
    warning per file.

    Args:
        source: images and captions.
        tokenizer: see `CaptionTokenizer`; every caption is tokenised once, here.
        transform: decodes and augments. With `load_pixels=False` only its flip_probability counts (None: no mirroring).
        order: which images make up a batch.
        batch_size: images per step over all processes; a multiple of `world_size`.
        captions_per_image: C; an image with fewer shows some of them again.
        context_length: most token ids a caption may have.
        seed: 0 or more.
        num_workers: processes that prefetch; 0 works in the caller's, as does `load_pixels=False`.
        load_pixels: whether to decode images; not needed if features of theirs are cached.
        skip: indices of images known to be unusable; replaced without a warning, and not counted as broken.
        rank, world_size: this process's part of each batch.
        pin_memory: whether batches lie in page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: no captions at all, or none for more than 10% of the images; an order for another number of
            images; while iterating, when more than 10% of the images turn out to be broken.
    """

    def __init__(
        self,
        source: ImageTextSource,
        tokenizer: CaptionTokenizer,
        transform: TrainTransform | None,
        order: EpochOrder,
        batch_size: int,
        captions_per_image: int,
        context_length: int,
        seed: int,
        num_workers: int = 0,
        *,
        load_pixels: bool = True,
        skip: Collection[int] = (),
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ):
        if order.num_samples != len(source):
            raise ValueError(f"the order is for {order.num_samples} images, the source has {len(source)}")
        if captions_per_image < 1:
            raise ValueError(f"captions_per_image must be 1 or more, got {captions_per_image}")
        if load_pixels and transform is None:
            raise ValueError("a transform is needed to load pixels")
        order.batch(0, 0, batch_size, rank=rank, world_size=world_size)  # unusable sizes fail here, not in a worker
        captions = TokenizedCaptions(source, tokenizer, context_length)
        unusable = captions.counts() == 0
        _check_captions(source, unusable)
        unusable[list(skip)] = True
        if unusable.all():
            raise ValueError("no image is left to train on: each has no caption or is to be skipped")
        self.order = order
        self.batch_size = batch_size
        self.num_workers = num_workers if load_pixels else 0
        self.pin_memory = pin_memory
        self.broken: dict[int, str] = {}
        """Reason by index, of the images that turned out to be broken so far."""
        self._served = 0
        self._dataset = _BatchDataset(
            source=source,
            captions=captions,
            pad_id=tokenizer.pad_id,
            transform=transform,
            order=order,
            batch_size=batch_size,
            captions_per_image=captions_per_image,
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

    def __len__(self) -> int:
        return self.steps_per_epoch

    def batch(self, epoch: int, step: int) -> CaptionBatch:
        """The batch at one position, made in the caller's process."""
        return self._account(self._dataset[(epoch, step)])

    def batches(self, epoch: int = 0, step: int = 0, *, stop_epoch: int | None = None) -> Iterator[CaptionBatch]:
        """Batches from a position on, epoch after epoch, until `stop_epoch` would begin (None: endlessly)."""
        positions = _Positions(self.steps_per_epoch, epoch, step, stop_epoch)
        loader = DataLoader(
            self._dataset,
            batch_size=None,  # the dataset makes whole batches
            sampler=positions,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            # Without one of its own, the loader would draw from the global generator, and with it change whatever
            # dropout draws next: a resumed run would part from an uninterrupted one.
            generator=torch.Generator(),
        )
        for item in loader:
            batch = self._account(item)
            yield batch.pin_memory() if self.pin_memory else batch

    def __iter__(self) -> Iterator[CaptionBatch]:
        return self.batches()

    def _account(self, item: tuple[CaptionBatch, tuple[BrokenImage, ...]]) -> CaptionBatch:
        """Warn of newly broken images, and stop if there are too many."""
        batch, broken = item
        self._served += len(batch.keys)
        for index, reason in broken:
            if index not in self.broken:
                self.broken[index] = reason
                warnings.warn(f"{reason}; another image takes its place", stacklevel=3)
        seen = min(self._served, self.order.num_samples)
        enough = seen >= min(_MIN_IMAGES_TO_JUDGE, self.order.num_samples)
        if enough and len(self.broken) > MAX_BROKEN_SHARE * seen:
            raise ValueError(
                f"{len(self.broken)} images are broken, more than {MAX_BROKEN_SHARE:.0%} of the {seen} read so far "
                f"({next(iter(self.broken.values()))}); find them with `opencoca data check` and remove them"
            )
        return batch


def _check_captions(source: ImageTextSource, without: np.ndarray) -> None:
    if not without.any():
        return
    if without.all():
        raise ValueError(f"none of the {len(source)} images has a caption to train on")
    first = source.key(int(np.argmax(without)))
    message = f"{int(without.sum())} of {len(source)} images have no caption, for example {first!r}"
    if without.mean() > MAX_BROKEN_SHARE:
        raise ValueError(f"{message}; that is more than {MAX_BROKEN_SHARE:.0%}, remove them or add their captions")
    warnings.warn(f"{message}; other images take their places", stacklevel=3)


def _unchanged(item: Any) -> Any:
    return item


class _Positions:
    """(epoch, step) after (epoch, step); iterable again and again."""

    def __init__(self, steps_per_epoch: int, epoch: int, step: int, stop_epoch: int | None):
        if epoch < 0 or not 0 <= step <= steps_per_epoch:
            raise ValueError(f"there is no step {step} of {steps_per_epoch} in epoch {epoch} to begin at")
        self.steps_per_epoch = steps_per_epoch
        self.epoch = epoch
        self.step = step
        self.stop_epoch = stop_epoch

    def __iter__(self) -> Iterator[Position]:
        epoch, step = self.epoch, self.step
        while self.stop_epoch is None or epoch < self.stop_epoch:
            for later in range(step, self.steps_per_epoch):
                yield epoch, later
            epoch, step = epoch + 1, 0


@dataclass
class _BatchDataset(Dataset):
    """Maps (epoch, step) to a batch and the images found broken on the way; what worker processes hold."""

    source: ImageTextSource
    captions: TokenizedCaptions
    pad_id: int
    transform: TrainTransform | None
    order: EpochOrder
    batch_size: int
    captions_per_image: int
    seed: int
    load_pixels: bool
    unusable: np.ndarray
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        self._broken: dict[int, str] = {}

    def __getitem__(self, position: Position) -> tuple[CaptionBatch, tuple[BrokenImage, ...]]:
        epoch, step = position
        wanted = self.order.batch(epoch, step, self.batch_size, rank=self.rank, world_size=self.world_size)
        samples = []
        broken: list[BrokenImage] = []
        for index in wanted:
            sample, failed = self._load_or_next(int(index), epoch)
            samples.append(sample)
            broken.extend(failed)
        texts = [self.captions.token_ids(caption) for sample in samples for caption in sample.captions]
        token_ids, token_mask = collate_captions(texts, self.pad_id)
        image_ids = [sample.index for sample in samples]
        batch = CaptionBatch(
            image_ids=torch.tensor(image_ids, dtype=torch.int64),
            pixels=torch.stack([sample.pixels for sample in samples]) if self.load_pixels and samples else None,
            mirrored=torch.tensor([sample.mirrored for sample in samples], dtype=torch.bool),
            token_ids=token_ids,
            token_mask=token_mask,
            keys=tuple(map(self.source.key, image_ids)),
        )
        return batch, tuple(broken)

    def _load_or_next(self, index: int, epoch: int) -> tuple[_Sample, list[BrokenImage]]:
        """The sample `index`, or the next one of the source that is good, and which ones were found broken."""
        broken: list[BrokenImage] = []
        for ahead in range(len(self.source)):
            candidate = (index + ahead) % len(self.source)
            if self.unusable[candidate]:
                continue
            try:
                if candidate not in self._broken:
                    return self._load(candidate, epoch), broken
            except (ImageError, OSError) as error:
                self._broken[candidate] = str(error)
            broken.append((candidate, self._broken[candidate]))
            if len(broken) >= _MAX_BROKEN_IN_A_ROW:
                break
        raise ValueError(f"{len(broken)} images in a row are broken: {broken[0][1]}")

    def _load(self, index: int, epoch: int) -> _Sample:
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch, index]))
        chance = bits.random_raw() / 2**64
        first, end = self.captions.image_starts[index : index + 2]
        chosen = first + choose_captions(int(end - first), self.captions_per_image, bits)
        flip_probability = self.transform.flip_probability if self.transform is not None else 0.0
        mirrored = bool(chance < flip_probability and not self.captions.sides[chosen].any())
        pixels = torch.empty(0)
        if self.load_pixels:
            assert self.transform is not None
            data, rng = self.source.open_bytes(index), np.random.Generator(bits)
            pixels = self.transform.decode(data, rng, flip=mirrored, name=self.source.key(index))
        return _Sample(index, mirrored, chosen, pixels)


@dataclass(frozen=True)
class _Sample:
    index: int
    mirrored: bool
    captions: np.ndarray
    pixels: torch.Tensor
