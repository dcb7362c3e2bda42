"""Every image of a source through a network's image encoder, batch by batch; images that cannot be read are left out.

Letters: B images of a batch, N image features, C their width, Q pooler queries, D width, E embed_dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from opencoca.data import EvalTransform, SampleSource, iterate_images
from opencoca.inference.pipeline import Pipeline
from opencoca.model.coca import CoCa, ImageOutput


@dataclass(frozen=True)
class BrokenImage:
    """An image that was left out: its key in the source or its path, and a sentence that says why."""

    image: str
    reason: str


@dataclass(frozen=True)
class EncodedImages:
    """Some images in the order of the source; the broken ones among them have no row.

    indices: positions in the source, B of them.
    features: (B, N, C) of the image encoder of `network`, on its device.
    """

    indices: tuple[int, ...]
    network: CoCa
    features: Tensor
    broken: tuple[BrokenImage, ...] = ()

    @cached_property
    def pooled(self) -> ImageOutput:
        """What the poolers make of the features; computed when it is first asked for."""
        return self.network.pool_image(self.features)

    @property
    def tokens(self) -> Tensor:
        """(B, Q, D), for the decoder."""
        return self.pooled.tokens

    @cached_property
    def embed(self) -> Tensor:
        """(B, E) float32, on the CPU, of length 1."""
        return self.pooled.embed.float().cpu()


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
                features = pipeline.model.image_features(batch.pixels.to(pipeline.device, pipeline.dtype))
                yield EncodedImages(tuple(batch.indices.tolist()), pipeline.model, features, broken)
            bar.update(len(batch.indices) + len(broken))


def _name(images: SampleSource | Sequence[str | Path], index: int) -> str:
    return images.key(index) if isinstance(images, SampleSource) else str(images[index])
