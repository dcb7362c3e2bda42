"""How one batch is made: read, decoded and replaced where a sample is bad. This is what worker processes hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from opencoca.data.batch import Batch
from opencoca.data.captions import CaptionsOnDemand, ShownCaptions, TokenizedCaptions, collate_captions
from opencoca.data.order import SampleOrder
from opencoca.data.quarantine import BadSample
from opencoca.data.read_ahead import parallel_map
from opencoca.data.remote import RemoteReadError
from opencoca.data.source import Sample, SampleSource
from opencoca.data.targets import Target
from opencoca.data.transforms import TrainTransform, normalize

Position = tuple[int, int]
EncodeTarget = Callable[[Target], np.ndarray | int | float]
"""A target as a row of `Batch.targets`; raises ValueError for one that the task can't use."""

_MAX_BROKEN_IN_A_ROW = 1000
_READING_THREADS = 16


class MadeBatch(NamedTuple):
    """A batch, and the bad samples met on the way to it, by index."""

    batch: Batch
    bad: tuple[tuple[int, BadSample], ...]


class _Loaded(NamedTuple):
    index: int
    mirrored: bool
    token_ids: list[np.ndarray]
    images: list[np.ndarray]  # each (H, W, 3) uint8
    target: np.ndarray | None


@dataclass
class BatchDataset(Dataset):
    """Maps (epoch, step) to a batch; the fields are those of `TrainingLoader`.

    captions: None for samples that are shown without texts.
    """

    source: SampleSource
    captions: TokenizedCaptions | CaptionsOnDemand | None
    pad_id: int
    transform: TrainTransform | None
    order: SampleOrder
    batch_size: int
    texts_per_sample: int
    images_per_sample: int
    encode_target: EncodeTarget | None
    seed: int
    load_pixels: bool
    unusable: np.ndarray
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        self._bad: dict[int, BadSample] = {}
        # What is read of a sample: captions that are tokenised already are not read again.
        self._wanted = {
            "images": self.load_pixels,
            "texts": isinstance(self.captions, CaptionsOnDemand),
            "target": self.encode_target is not None,
        }

    def __getitem__(self, position: Position) -> MadeBatch | Exception:
        """The batch. In a worker process an error is returned, as PyTorch would wrap its message in a traceback."""
        (epoch, step), share = position, {"rank": self.rank, "world_size": self.world_size}
        try:
            wanted = self.order.visits(epoch, step, self.batch_size, **share)
            if not len(wanted.indices):
                # A process whose share of the step is empty gives the others' kind of batch all the same.
                whole = self.order.visits(epoch, step, self.batch_size, rank=0, world_size=1)
                sample, _ = self._load_or_next(int(whole.indices[0]), int(whole.passes[0]), {})
                return MadeBatch(self._collate([sample]).split(2)[1], ())
            read_ahead = self._read_ahead(wanted.indices) if self.source.is_remote and self.load_pixels else {}
            samples: list[_Loaded] = []
            bad: list[tuple[int, BadSample]] = []
            for index, number in zip(wanted.indices.tolist(), wanted.passes.tolist(), strict=True):
                sample, failed = self._load_or_next(index, number, read_ahead)
                samples.append(sample)
                bad.extend(failed)
            return MadeBatch(self._collate(samples), tuple(bad))
        except (ValueError, OSError, ImportError) as error:
            if get_worker_info() is None:
                raise
            return error

    def _collate(self, samples: list[_Loaded]) -> Batch:
        token_ids, token_mask = collate_captions([ids for sample in samples for ids in sample.token_ids], self.pad_id)
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
        self, index: int, number: int, read_ahead: dict[int, Sample | Exception]
    ) -> tuple[_Loaded, Sequence[tuple[int, BadSample]]]:
        """The sample `index`, or the next one of the source that is good, and which ones were found to be bad."""
        bad: list[tuple[int, BadSample]] = []
        for ahead in range(len(self.source)):
            candidate = (index + ahead) % len(self.source)
            if self.unusable[candidate]:
                continue
            try:
                if candidate not in self._bad:
                    return self._load(candidate, number, read_ahead.get(candidate)), bad
            except RemoteReadError:  # the sample may be good; without it, the run would not be the same
                raise
            except (ValueError, OSError) as error:
                file, offset = self.source.place(candidate)
                self._bad[candidate] = BadSample(self.source.key(candidate), file, offset, str(error))
            bad.append((candidate, self._bad[candidate]))
            if len(bad) >= _MAX_BROKEN_IN_A_ROW:
                break
        raise ValueError(f"{len(bad)} images in a row are broken: {bad[0][1].reason}")

    def _load(self, index: int, number: int, read: Sample | Exception | None) -> _Loaded:
        if isinstance(read, Exception):
            raise read
        key, sample = self.source.key(index), self.source.read(index, **self._wanted) if read is None else read
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, number, index]))
        chance = bits.random_raw() / 2**64
        shown = ShownCaptions([], False)
        if self.captions is not None:
            found = self.captions.show(index, sample, self.texts_per_sample, bits)
            if found is None:
                raise ValueError(f"the image {key!r} has no caption")
            shown = found
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
