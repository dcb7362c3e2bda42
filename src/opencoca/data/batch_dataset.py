"""How one batch is made: read, decoded and replaced where a sample is bad. This is what worker processes hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from opencoca.data.batch import Batch
from opencoca.data.captions import CaptionsOnDemand, TokenizedCaptions, collate_captions
from opencoca.data.files import parallel_map
from opencoca.data.order import SampleOrder
from opencoca.data.quarantine import BadSample
from opencoca.data.remote import RemoteReadError
from opencoca.data.source import ImageTextSource, Sample
from opencoca.data.transforms import TrainTransform, normalize

Position = tuple[int, int]
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
    pixels: np.ndarray | None  # (H, W, 3) uint8


@dataclass
class BatchDataset(Dataset):
    """Maps (epoch, step) to a batch; the fields are those of `TrainingLoader`."""

    source: ImageTextSource
    captions: TokenizedCaptions | CaptionsOnDemand
    pad_id: int
    transform: TrainTransform | None
    order: SampleOrder
    batch_size: int
    captions_per_image: int
    seed: int
    load_pixels: bool
    unusable: np.ndarray
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        self._bad: dict[int, BadSample] = {}

    def __getitem__(self, position: Position) -> MadeBatch | Exception:
        """The batch. In a worker process an error is returned, as PyTorch would wrap its message in a traceback."""
        try:
            return self._make(*position)
        except (ValueError, OSError, ImportError) as error:
            if get_worker_info() is None:
                raise
            return error

    def _make(self, epoch: int, step: int) -> MadeBatch:
        wanted = self.order.visits(epoch, step, self.batch_size, rank=self.rank, world_size=self.world_size)
        read_ahead = self._read_ahead(wanted.indices)
        samples: list[_Loaded] = []
        bad: list[tuple[int, BadSample]] = []
        for index, number in zip(wanted.indices.tolist(), wanted.passes.tolist(), strict=True):
            sample, failed = self._load_or_next(index, number, read_ahead)
            samples.append(sample)
            bad.extend(failed)
        texts = [token_ids for sample in samples for token_ids in sample.token_ids]
        token_ids, token_mask = collate_captions(texts, self.pad_id)
        if not samples:  # that the step has texts must be seen of a share without samples
            token_ids, token_mask = token_ids.new_zeros(0, 1), token_mask.new_zeros(0, 1)
        sample_ids = [sample.index for sample in samples]
        batch = Batch(
            sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
            images=self._stack(samples) if self.load_pixels else None,
            token_ids=token_ids,
            token_mask=token_mask,
            mirrored=torch.tensor([sample.mirrored for sample in samples], dtype=torch.bool),
            keys=tuple(map(self.source.key, sample_ids)),
        )
        return MadeBatch(batch, tuple(bad))

    def _stack(self, samples: list[_Loaded]) -> torch.Tensor:
        assert self.transform is not None
        rows = [sample.pixels for sample in samples if sample.pixels is not None]
        # A process whose share of the step is empty has pixels all the same, of no image.
        blank = np.zeros((0, *self.transform.config.image_size, 3), dtype=np.uint8)
        return normalize(np.stack(rows) if rows else blank, self.transform.config)

    def _read_ahead(self, indices: np.ndarray) -> dict[int, Sample | Exception]:
        """Remote samples of the batch: many requests at a time, as each takes long."""
        if not self.source.is_remote or not self.load_pixels:
            return {}
        good = [index for index in dict.fromkeys(indices.tolist()) if index not in self._bad]

        def read(index: int) -> Sample | Exception:
            try:
                return self.source.read(index)
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
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, number, index]))
        chance = bits.random_raw() / 2**64
        data, captions = self._read(index, read)
        shown = self.captions.show(index, captions, self.captions_per_image, bits)
        if shown is None:
            raise ValueError(f"the image {self.source.key(index)!r} has no caption")
        flip_probability = self.transform.flip_probability if self.transform is not None else 0.0
        mirrored = bool(chance < flip_probability and not shown.mention_side)
        pixels = None
        if self.load_pixels:
            assert self.transform is not None
            rng = np.random.Generator(bits)
            pixels = self.transform.decode_uint8(data, rng, flip=mirrored, name=self.source.key(index))
        return _Loaded(index, mirrored, shown.token_ids, pixels)

    def _read(self, index: int, read: Sample | Exception | None) -> Sample:
        """Only what is needed of a sample: captions that are tokenised already are not read again."""
        if isinstance(read, Exception):
            raise read
        if read is not None:
            return read
        if isinstance(self.captions, TokenizedCaptions):
            return Sample(self.source.open_bytes(index) if self.load_pixels else b"", ())
        if self.load_pixels:
            return self.source.read(index)
        return Sample(b"", self.source.read_captions(index))
