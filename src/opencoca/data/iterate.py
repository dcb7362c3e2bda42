"""Every image once, in order, for embedding, captioning and evaluation: decoded ahead in threads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from opencoca.data.files import parallel_map
from opencoca.data.images import ImageData, ImageError, decode_image, to_rgb
from opencoca.data.source import SampleSource
from opencoca.data.transforms import EvalTransform, normalize


class ImageBatch(NamedTuple):
    """Up to batch_size images. Broken ones are in `errors` as (index, reason) and have no row in the other fields."""

    indices: torch.Tensor  # (B,) int64, positions in the source or list
    pixels: torch.Tensor  # (B, 3, H, W) float32
    errors: tuple[tuple[int, str], ...]


def iterate_images(
    images: SampleSource | Sequence[ImageData | Image.Image],
    transform: EvalTransform,
    batch_size: int,
    num_workers: int | None = None,
) -> Iterator[ImageBatch]:
    """Decode and transform all images, `batch_size` at a time, while the caller works on the batch before.

    Args:
        images: a source, or a list of paths, encoded bytes and PIL images.
        transform: the model's preprocessing.
        batch_size: images per batch; the last may be smaller, and one with broken images is.
        num_workers: threads; None is one per processor up to 16, 0 decodes in the caller's thread.

    Raises:
        ValueError: batch_size or num_workers out of range. Broken images raise nothing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if num_workers is None:
        num_workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    as_stored = transform.config.decoding == "as_stored"

    def load(index: int) -> tuple[int, np.ndarray | str]:
        try:
            return index, transform.to_uint8(_decode(images, index, as_stored))
        except (ImageError, OSError) as error:
            return index, str(error)

    return _batches(parallel_map(load, range(len(images)), num_workers, 2 * batch_size), transform, batch_size)


def _decode(images: SampleSource | Sequence[ImageData | Image.Image], index: int, as_stored: bool) -> Image.Image:
    if isinstance(images, SampleSource):
        return decode_image(images.open_bytes(index), name=images.key(index), as_stored=as_stored)
    image = images[index]
    if isinstance(image, Image.Image):
        return image if as_stored else to_rgb(image)
    return decode_image(image, name=f"image {index}" if isinstance(image, bytes) else None, as_stored=as_stored)


def _batches(
    results: Iterator[tuple[int, np.ndarray | str]], transform: EvalTransform, batch_size: int
) -> Iterator[ImageBatch]:
    indices: list[int] = []
    arrays: list[np.ndarray] = []
    errors: list[tuple[int, str]] = []

    def batch() -> ImageBatch:
        height, width = transform.config.image_size
        stacked = np.stack(arrays) if arrays else np.zeros((0, height, width, 3), dtype=np.uint8)
        pixels = normalize(stacked, transform.config)
        return ImageBatch(torch.tensor(indices, dtype=torch.int64), pixels, tuple(errors))

    for index, result in results:
        if isinstance(result, str):
            errors.append((index, result))
        else:
            indices.append(index)
            arrays.append(result)
        if len(indices) + len(errors) == batch_size:
            yield batch()
            indices, arrays, errors = [], [], []
    if indices or errors:
        yield batch()
