"""The batch that the loader makes, the training step takes and validation scores.

Letters: S samples, F images per sample, C texts per sample, T token positions, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one step, on one process. Rows of images and texts lie sample by sample.

    Attributes:
        sample_ids: (S,) int64, positions in the source; samples of equal ids show the same picture.
        images: (S * F, 3, H, W) pixels, or (S * F, ...) what stage `from_stage` of the image encoder takes; None where
            images were not loaded.
        token_ids: (S * C, T) int64, padded at the end. Without texts C and T are 0.
        token_mask: (S * C, T) bool, True where a token is real.
        targets: (S, ...) as the task encodes them: int64 classes, or float32 weights; None without targets.
        mirrored: (S,) bool, whether `images` are mirrored left to right (without images: whether features should be).
        keys: names of the samples.
        from_stage: the first stage of the image encoder that `images` have yet to pass.
        micro_batch_sizes: samples of each micro-batch of the step; () for sizes as even as possible.
        images_per_sample: F.
    """

    sample_ids: Tensor
    images: Tensor | None
    token_ids: Tensor
    token_mask: Tensor
    targets: Tensor | None = None
    mirrored: Tensor | None = None
    keys: tuple[str, ...] = ()
    from_stage: int = 0
    micro_batch_sizes: tuple[int, ...] = ()
    images_per_sample: int = 1

    def __post_init__(self) -> None:
        samples = self.num_samples
        assert self.images is None or len(self.images) == samples * self.images_per_sample
        assert len(self.token_ids) == len(self.token_mask) == samples * self.texts_per_sample
        assert self.targets is None or len(self.targets) == samples

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.sample_ids)

    @property
    def texts_per_sample(self) -> int:
        """C; 0 for a batch without samples."""
        return len(self.token_ids) // max(1, self.num_samples)

    @property
    def text_sample_ids(self) -> Tensor:
        """(S * C,) the id of the sample that each text belongs to."""
        return self.sample_ids.repeat_interleave(self.texts_per_sample)

    @property
    def num_tokens(self) -> int:
        """The number of real tokens of all texts."""
        return int(self.token_mask.sum())

    @property
    def num_next_words(self) -> int:
        """The number of words that have one before them, and so a captioning loss."""
        return self.num_tokens - len(self.token_mask)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`; images stored in half precision become float32 there."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if moved.images is None:
            return moved
        return replace(moved, images=moved.images.to(torch.promote_types(moved.images.dtype, torch.float32)))

    def pin_memory(self) -> Batch:
        """The same batch with its tensors in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def micro_batches(self, parts: int) -> list[Batch]:
        """The micro-batches of the step, of whole samples; one may be empty."""
        if not self.micro_batch_sizes:
            return self.split(parts)
        assert len(self.micro_batch_sizes) == parts
        assert sum(self.micro_batch_sizes) == self.num_samples
        return self._cut(self.micro_batch_sizes)

    def split(self, parts: int) -> list[Batch]:
        """Parts of whole samples, as even as possible; one may be empty."""
        size, larger = divmod(self.num_samples, parts)
        return self._cut([size + (part < larger) for part in range(parts)])

    def stand_in(self) -> Batch:
        """One blank sample of the same kind, for a process without samples that must run the network all the same.

        It has one text of two words if the batch is one with texts, which also an empty one shows by its T.
        """
        texts = int(self.token_ids.shape[1] > 0)
        token_ids = self.token_ids.new_zeros(texts, 2 * texts)
        return Batch(
            sample_ids=self.sample_ids.new_zeros(1),
            images=_blank(self.images, self.images_per_sample),
            token_ids=token_ids,
            token_mask=torch.ones_like(token_ids, dtype=torch.bool),
            targets=_blank(self.targets, 1),
            mirrored=_blank(self.mirrored, 1),
            from_stage=self.from_stage,
            images_per_sample=self.images_per_sample,
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(v) for name, v in values.items() if isinstance(v, Tensor)})

    def _cut(self, sizes: Sequence[int]) -> list[Batch]:
        """Parts of so many samples, one after the other."""
        pieces, start = [], 0
        for size in sizes:
            images, texts = (
                slice(start * per_sample, (start + size) * per_sample)
                for per_sample in (self.images_per_sample, self.texts_per_sample)
            )
            samples = slice(start, start + size)
            piece = Batch(
                sample_ids=self.sample_ids[samples],
                images=_rows(self.images, images),
                token_ids=self.token_ids[texts],
                token_mask=self.token_mask[texts],
                targets=_rows(self.targets, samples),
                mirrored=_rows(self.mirrored, samples),
                keys=self.keys[samples],
                from_stage=self.from_stage,
                images_per_sample=self.images_per_sample,
            )
            pieces.append(piece)
            start += size
        return pieces


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _blank(tensor: Tensor | None, rows: int) -> Tensor | None:
    return None if tensor is None else tensor.new_zeros(rows, *tensor.shape[1:])
