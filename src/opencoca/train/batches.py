"""What a training step takes in: images or their cached features, with captions, from any (epoch, step) on."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opencoca.data import CaptionBatch, EpochOrder, ImageTextSource, TrainingLoader, TrainTransform
from opencoca.tokenizer import Tokenizer
from opencoca.train.feature_cache import FeatureCache
from opencoca.train.recipe import Recipe


@dataclass(frozen=True)
class TrainBatch:
    """inputs (I, ...): pixels, or what the encoder's stage ``from_stage`` takes; texts as in `CaptionBatch`."""

    inputs: Tensor
    from_stage: int
    image_ids: Tensor
    token_ids: Tensor
    token_mask: Tensor

    def to(self, device: torch.device) -> "TrainBatch":
        """The same batch on ``device``; inputs stored in half precision become float32 there."""
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.image_ids, self.token_ids, self.token_mask))
        return TrainBatch(self.inputs.to(device, non_blocking=True).float(), self.from_stage, *moved)

    def split(self, parts: int) -> Iterator["TrainBatch"]:
        """Micro-batches of whole images with their texts, as even as possible."""
        texts_per_image = len(self.token_ids) // len(self.image_ids)
        for rows in torch.arange(len(self.image_ids)).tensor_split(parts):
            if len(rows) == 0:
                continue
            start, stop = int(rows[0]), int(rows[-1]) + 1
            texts = slice(start * texts_per_image, stop * texts_per_image)
            inputs, image_ids = self.inputs[start:stop], self.image_ids[start:stop]
            yield TrainBatch(inputs, self.from_stage, image_ids, self.token_ids[texts], self.token_mask[texts])


class TrainBatches:
    """Endless, stateless supply: ``iterate(step)`` gives the batches of global step ``step`` and all that follow."""

    def __init__(
        self,
        recipe: Recipe,
        source: ImageTextSource,
        tokenizer: Tokenizer,
        transform: TrainTransform,
        context_length: int,
        cache: FeatureCache | None,
        cached_stages: int,
    ):
        order = EpochOrder(len(source), recipe.seed, drop_last=len(source) >= recipe.batch_size)
        self.loader = TrainingLoader(
            source,
            tokenizer,
            transform,
            order,
            recipe.batch_size,
            recipe.data.captions_per_image,
            context_length,
            recipe.seed,
            recipe.data.num_workers,
            load_pixels=cache is None,
            skip=tuple(cache.broken) if cache else (),
            pin_memory=torch.cuda.is_available(),
        )
        self.steps_per_epoch = order.steps_per_epoch(recipe.batch_size)
        self.seed = recipe.seed
        self.cache = cache
        self.cached_stages = cached_stages

    def iterate(self, step: int) -> Iterator[TrainBatch]:
        """Batches from global step ``step`` on, without end."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        for batch in self.loader.batches(epoch, offset):
            yield self._prepare(batch, step // self.steps_per_epoch)
            step += 1

    def _prepare(self, batch: CaptionBatch, epoch: int) -> TrainBatch:
        if self.cache is None:
            assert batch.pixels is not None
            inputs, from_stage = batch.pixels, 0
        else:
            images = batch.image_ids.numpy()
            views = self._choose_views(images, epoch, batch.mirrored.numpy())
            inputs, from_stage = self.cache.read(views, images), self.cached_stages
        return TrainBatch(inputs, from_stage, batch.image_ids, batch.token_ids, batch.token_mask)

    def _choose_views(self, images: np.ndarray, epoch: int, mirrored: np.ndarray) -> np.ndarray:
        """One view an image, (I,): a pure function of (seed, epoch, image)."""
        assert self.cache is not None
        count = self.cache.features.shape[0]
        drawn = [np.random.PCG64(np.random.SeedSequence([self.seed, epoch, int(i), 7])).random_raw() for i in images]
        views = np.array([int(bits % np.uint64(count)) for bits in drawn])
        return np.where(views < 2, np.minimum(mirrored, count - 1), views)
