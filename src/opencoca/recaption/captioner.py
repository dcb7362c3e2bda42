"""Captions the images of a source batch by batch; the next images are decoded while the model is busy."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opencoca.data import EvalTransform, ImageBatch, SampleSource, Subset, iterate_images
from opencoca.generation import GeneratedCaption, GenerationOptions
from opencoca.generation.rerank import check_rerank
from opencoca.inference.pipeline import Pipeline

Row = dict[str, Any]
"""A row as JSON can hold it."""
_DIGITS = 4  # further digits are rounding errors


@dataclass(frozen=True)
class Captioner:
    """A pipeline, the options of generation, and the weight of similarity in reranking (see `Pipeline.caption`).

    Raises ValueError for options that leave nothing to rerank, or a weight outside of 0 to 1.
    """

    pipeline: Pipeline
    options: GenerationOptions
    rerank: bool | float = False

    def __post_init__(self) -> None:
        check_rerank(self.options, self.rerank)

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    @property
    def image_size(self) -> tuple[int, int]:
        """The (height, width) in pixels of the images that the model sees."""
        return self.pipeline.preprocess.config.image_size

    def __call__(self, pixels: Tensor, names: Sequence[str]) -> list[tuple[GeneratedCaption, ...]]:
        """Captions preprocessed images (I, 3, H, W), best first; random captions depend on the seed and the name."""
        pixels = pixels.to(self.device, self.pipeline.dtype)
        return self.pipeline.caption_pixels(pixels, self.options, names=names, rerank=self.rerank)


@dataclass(frozen=True)
class CaptionedImage:
    """An image's name with its captions, best first, or with the reason why it cannot be read."""

    image: str
    captions: tuple[GeneratedCaption, ...] = ()
    error: str | None = None


def caption_source(
    captioner: Captioner,
    source: SampleSource,
    batch_size: int,
    *,
    start: int = 0,
    num_workers: int | None = None,
) -> Generator[list[CaptionedImage], None, None]:
    """Captions a source's images from number `start` on, batch_size at a time, in their order.

    Threads decode the images of the next two batches, and another one assembles the next batch, while the model works
    on the present one. Random numbers depend on the options' seed and the image's name alone.

    Raises ValueError if batch_size is not positive; images that cannot be read raise nothing.
    """
    remaining = Subset(source, range(start, len(source))) if start else source
    transform = EvalTransform(captioner.pipeline.preprocess.config)
    with contextlib.closing(iterate_images(remaining, transform, batch_size, num_workers)) as batches:
        for batch in batches:
            yield _caption_batch(captioner, remaining, batch)


def _caption_batch(captioner: Captioner, source: SampleSource, batch: ImageBatch) -> list[CaptionedImage]:
    done = {index: CaptionedImage(source.key(index), error=reason) for index, reason in batch.errors}
    indices = batch.indices.tolist()
    if indices:
        keys = [source.key(index) for index in indices]
        captions = captioner(batch.pixels, keys)
        done |= {i: CaptionedImage(k, c) for i, k, c in zip(indices, keys, captions, strict=True)}
    return [done[index] for index in sorted(done)]


def to_journal_row(image: CaptionedImage) -> Row:
    """Makes an image's row in the journal: {"image", "captions"} or {"image", "error"}.

    A caption has its similarity to the image if captions were reranked, and both similarity and confidence if the model
    has a calibration.
    """
    if image.error is not None:
        return {"image": image.image, "error": image.error}
    captions: list[Row] = []
    for found in image.captions:
        scores = {"log_probability": round(found.log_probability, _DIGITS), "length": found.length}
        for name in ("similarity", "confidence"):
            if (value := getattr(found, name)) is not None:
                scores[name] = round(value, _DIGITS)
        captions.append({"caption": found.text, **scores})
    return {"image": image.image, "captions": captions}


def output_rows(row: Row) -> Iterator[Row]:
    """Makes a row for each caption in a row of the journal: the image and what is stored of the caption.

    Where an image has several captions, each row has the caption's rank, 0 for the best.
    """
    captions = row.get("captions", [])
    for rank, caption in enumerate(captions):
        yield {"image": row["image"], **({"rank": rank} if len(captions) > 1 else {}), **caption}
