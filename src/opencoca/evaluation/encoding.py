"""Every image of a source through a model's image half, batch by batch; images that cannot be read are passed over.

Letters: B images of a batch, Q pooler queries, D width, E embed_dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from opencoca.data import EvalTransform, SampleSource, iterate_images
from opencoca.inference.pipeline import Pipeline


@dataclass(frozen=True)
class BrokenImage:
    """An image that was left out: its key in the source or its path, and a sentence that says why."""

    image: str
    reason: str


@dataclass(frozen=True)
class EncodedImages:
    """Some images in the order of the source; the broken ones among them have no row.

    indices: positions in the source, B of them.
    tokens: (B, Q, D), on the model's device, for the decoder.
    embed: (B, E) float32, on the CPU, of length 1.
    """

    indices: tuple[int, ...]
    tokens: Tensor
    embed: Tensor
    broken: tuple[BrokenImage, ...]


def encode_images(
    pipeline: Pipeline,
    images: SampleSource | Sequence[str | Path],
    batch_size: int,
    *,
    progress: bool = False,
    description: str = "reading images",
) -> Iterator[EncodedImages]:
    """Encodes all images, `batch_size` at a time, while threads decode the next ones.

    Raises ValueError if batch_size is not positive; broken images raise nothing.
    """
    transform = EvalTransform(pipeline.preprocess.config)
    with tqdm(total=len(images), desc=description, unit="image", disable=not progress) as bar:
        for batch in iterate_images(images, transform, batch_size):
            broken = tuple(BrokenImage(_name(images, index), reason) for index, reason in batch.errors)
            with torch.inference_mode():
                output = pipeline.model.encode_image(batch.pixels.to(pipeline.device, pipeline.dtype))
            yield EncodedImages(tuple(batch.indices.tolist()), output.tokens, output.embed.float().cpu(), broken)
            bar.update(len(batch.indices) + len(broken))


def _name(images: SampleSource | Sequence[str | Path], index: int) -> str:
    return images.key(index) if isinstance(images, SampleSource) else str(images[index])


def require_images(count: int, broken: Sequence[BrokenImage], wanted: str = "images that can be read") -> None:
    """Raises ValueError, with the first broken image's reason, if there is nothing to score."""
    if count == 0:
        reason = f"; the first of {len(broken)} that cannot: {broken[0].reason}" if broken else ""
        raise ValueError(f"there are no {wanted}{reason}")
