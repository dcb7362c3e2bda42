"""The batch that the loader makes, the training step takes and validation scores.

Letters: S samples, F images per sample, C texts per sample, T token positions, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        assert len(self.token_ids) == len(self.token_mask)
        assert len(self.token_ids) % samples == 0 if samples else not len(self.token_ids)
        assert self.targets is None or len(self.targets) == samples

    @property
    def num_samples(self) -> int:
        """The number of samples, S."""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """The number of real tokens of all texts."""
        return int(self.token_mask.sum())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`; images stored in half precision become float32 there."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        if (images := moved.get("images")) is not None:
            moved["images"] = images.to(torch.promote_types(images.dtype, torch.float32))
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch with its tensors in page-locked memory."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})

    def split(self, parts: int) -> list[Batch]:
        """Parts of whole samples: the micro-batches of the step, or where those have no sizes, as even as possible.

        A part may be empty.
        """
        size, larger = divmod(self.num_samples, parts)
        sizes = self.micro_batch_sizes or tuple(size + (part < larger) for part in range(parts))
        assert len(sizes) == parts
        assert sum(sizes) == self.num_samples
        texts_per_sample = len(self.token_ids) // max(1, self.num_samples)
        per_sample = {"images": self.images_per_sample, "token_ids": texts_per_sample, "token_mask": texts_per_sample}
        rows = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)} | {"keys": self.keys}
        pieces, start = [], 0
        for size in sizes:
            stop = start + size
            piece = {n: v[start * per_sample.get(n, 1) : stop * per_sample.get(n, 1)] for n, v in rows.items()}
            pieces.append(replace(self, micro_batch_sizes=(), **piece))
            start = stop
        return pieces

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


def _blank(tensor: Tensor | None, rows: int) -> Tensor | None:
    return None if tensor is None else tensor.new_zeros(rows, *tensor.shape[1:])
