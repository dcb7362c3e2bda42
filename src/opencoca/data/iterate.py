"""Every image once, in order, for embedding, captioning and evaluation: decoded ahead in threads."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from opencoca.data.images import ImageData, ImageError, decode_image, to_rgb
from opencoca.data.read_ahead import batches_ahead, one_ahead
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
) -> Generator[ImageBatch, None, None]:
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
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
    if num_workers is None:
        num_workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    as_stored = transform.config.decoding == "as_stored"

    def load(index: int) -> tuple[int, np.ndarray | str]:
        try:
            return index, transform.to_uint8(_decode(images, index, as_stored))
        except (ImageError, OSError) as error:
            return index, str(error)

    batches = _batches(batches_ahead(load, range(len(images)), batch_size, num_workers), transform)
    return one_ahead(batches, math.ceil(len(images) / batch_size)) if num_workers else batches


def _decode(images: SampleSource | Sequence[ImageData | Image.Image], index: int, as_stored: bool) -> Image.Image:
    if isinstance(images, SampleSource):
        return decode_image(images.open_bytes(index), name=images.key(index), as_stored=as_stored)
    image = images[index]
    if isinstance(image, Image.Image):
        return image if as_stored else to_rgb(image)
    return decode_image(image, name=f"image {index}" if isinstance(image, bytes) else None, as_stored=as_stored)


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
