"""Every image once, in order, for embedding, captioning and evaluation: decoded ahead in threads."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from opencoca.data.images import ImageError, decode_image
from opencoca.data.read_ahead import batches_ahead, one_ahead
from opencoca.data.source import SampleSource
from opencoca.data.sources import ImageFolder
from opencoca.data.transforms import EvalTransform, normalize


class ImageBatch(NamedTuple):
    """Up to batch_size images. Broken ones are in `errors` as (index, reason) and have no row in the other fields."""

    indices: torch.Tensor  # (B,) int64, positions in the source or list
    pixels: torch.Tensor  # (B, 3, H, W) float32
    errors: tuple[tuple[int, str], ...]


def iterate_images(
    images: SampleSource | Sequence[str | Path],
    transform: EvalTransform,
    batch_size: int,
    num_workers: int | None = None,
) -> Generator[ImageBatch, None, None]:
    """Decode and transform all images, `batch_size` at a time, while the caller works on the batch before.

    Args:
        images: a source, or a list of paths; of a sample with several images the first counts.
        transform: the model's preprocessing.
        batch_size: images per batch; the last may be smaller, and one with broken images is.
        num_workers: threads; None is one per processor up to 16, 0 decodes in the caller's thread.

    Raises:
        ValueError: batch_size or num_workers out of range. Broken images raise nothing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
    if num_workers is None:
        num_workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    source = images if isinstance(images, SampleSource) else ImageFolder("", map(str, images))
    as_stored = transform.config.decoding == "as_stored"

    def load(index: int) -> tuple[int, np.ndarray | str]:
        try:
            data = source.open_bytes(index)
            return index, transform.to_uint8(decode_image(data, name=source.key(index), as_stored=as_stored))
        except (ImageError, OSError) as error:
            return index, str(error)

    batches = _batches(batches_ahead(load, range(len(source)), batch_size, num_workers), transform)
    return one_ahead(batches, math.ceil(len(source) / batch_size)) if num_workers else batches


def _batches(
    results: Iterable[list[tuple[int, np.ndarray | str]]], transform: EvalTransform
) -> Generator[ImageBatch, None, None]:
    height, width = transform.config.image_size
    for rows in results:
        good = [(index, found) for index, found in rows if not isinstance(found, str)]
        errors = tuple((index, found) for index, found in rows if isinstance(found, str))
        pixels = np.stack([array for _, array in good]) if good else np.zeros((0, height, width, 3), dtype=np.uint8)
        indices = torch.tensor([index for index, _ in good], dtype=torch.int64)
        yield ImageBatch(indices, normalize(pixels, transform.config), errors)
