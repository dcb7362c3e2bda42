"""A training batch. Letters: I images, C captions per image, T token positions, H height, W width."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch


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
