"""A model together with the options that it captions with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opencoca.generation import GeneratedCaption, GenerationOptions
from opencoca.generation.rerank import check_rerank
from opencoca.inference.pipeline import Pipeline


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
