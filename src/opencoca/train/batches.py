"""What a training step takes in: images or their cached features, with captions, from any (epoch, step) on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opencoca.data import CaptionBatch, ImageTextSource, TrainingLoader, TrainTransform
from opencoca.distributed.world import World
from opencoca.tokenizer import Tokenizer
from opencoca.train.data_sources import training_order
from opencoca.train.feature_cache import FeatureCache
from opencoca.train.recipe.recipe import Recipe


@dataclass(frozen=True)
class TrainBatch:
    """inputs (I, ...): pixels, or what the encoder's stage ``from_stage`` takes; texts as in `CaptionBatch`.

    micro_batch_sizes: how many images belong to each micro-batch of the step; () = as even as possible.
    """

    inputs: Tensor
    from_stage: int
    image_ids: Tensor
    token_ids: Tensor
    token_mask: Tensor
    micro_batch_sizes: tuple[int, ...] = ()

    @property
    def text_image_ids(self) -> Tensor:
        """(B,) which image each text describes."""
        return self.image_ids.repeat_interleave(len(self.token_ids) // max(1, len(self.image_ids)))

    @property
    def num_next_words(self) -> int:
        """How many words have one before them, and so a captioning loss."""
        return int(self.token_mask.sum()) - len(self.token_mask)

    def to(self, device: torch.device) -> "TrainBatch":
        """The same batch on ``device``; inputs stored in half precision become float32 there."""
        tensors = (self.inputs, self.image_ids, self.token_ids, self.token_mask)
        inputs, image_ids, token_ids, token_mask = (tensor.to(device, non_blocking=True) for tensor in tensors)
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        return TrainBatch(inputs, self.from_stage, image_ids, token_ids, token_mask)

    def stand_in(self) -> "TrainBatch":
        """One black image with a text of two words, for a process that has none of its own to run the network on."""
        inputs = self.inputs.new_zeros(1, *self.inputs.shape[1:])
        ids = self.token_ids.new_zeros(1, 2)
        return TrainBatch(inputs, self.from_stage, self.image_ids.new_zeros(1), ids, torch.ones_like(ids).bool())

    def micro_batches(self, parts: int) -> list["TrainBatch"]:
        """The micro-batches of the step, of whole images with their texts; one may be empty."""
        if not self.micro_batch_sizes:
            return self.split(parts)
        assert len(self.micro_batch_sizes) == parts
        assert sum(self.micro_batch_sizes) == len(self.image_ids)
        return self._cut(self.micro_batch_sizes)

    def split(self, parts: int) -> list["TrainBatch"]:
        """Parts of whole images with their texts, as even as possible; one may be empty."""
        size, larger = divmod(len(self.image_ids), parts)
        return self._cut(tuple(size + (part < larger) for part in range(parts)))

    def _cut(self, sizes: tuple[int, ...]) -> list["TrainBatch"]:
        texts_per_image = len(self.token_ids) // max(1, len(self.image_ids))
        pieces, start = [], 0
        for size in sizes:
            stop = start + size
            texts = slice(start * texts_per_image, stop * texts_per_image)
            inputs, image_ids = self.inputs[start:stop], self.image_ids[start:stop]
            pieces.append(TrainBatch(inputs, self.from_stage, image_ids, self.token_ids[texts], self.token_mask[texts]))
            start = stop
        return pieces


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
        world: World | None = None,
    ):
        """world: the processes that share out each batch."""
        world = world or World()
        order = training_order(source, recipe)
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
            rank=world.rank,
            world_size=world.size,
            pin_memory=torch.cuda.is_available(),
            quarantine=Path(recipe.output) / "bad_samples.jsonl",
            max_bad_share=recipe.data.max_bad_share,
        )
        self.steps_per_epoch = order.steps_per_epoch(recipe.batch_size)
        self.order, self.batch_size, self.world = order, recipe.batch_size, world
        self.input_shape = (3, *recipe.model.image.image_size)
        self.seed = recipe.seed
        self.cache = cache
        self.cached_stages = cached_stages

    def iterate(self, step: int) -> Iterator[TrainBatch]:
        """Batches from global step ``step`` on, without end."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        for batch in self.loader.batches(epoch, offset):
            yield self._prepare(batch, *divmod(step, self.steps_per_epoch))
            step += 1

    def _prepare(self, batch: CaptionBatch, epoch: int, step: int) -> TrainBatch:
        if self.cache is None:
            # Of a batch with fewer images than there are processes, one may have none.
            pixels = torch.zeros(0, *self.input_shape) if batch.pixels is None else batch.pixels
            inputs, from_stage = pixels, 0
        else:
            images = batch.image_ids.numpy()
            views = self._choose_views(images, epoch, batch.mirrored.numpy())
            inputs, from_stage = self.cache.read(views, images), self.cached_stages
        sizes = self.order.micro_batch_sizes(step, self.batch_size, rank=self.world.rank, world_size=self.world.size)
        return TrainBatch(inputs, from_stage, batch.image_ids, batch.token_ids, batch.token_mask, sizes)

    def _choose_views(self, images: np.ndarray, epoch: int, mirrored: np.ndarray) -> np.ndarray:
        """One view an image, (I,): a pure function of (seed, epoch, image)."""
        assert self.cache is not None
        count = self.cache.features.shape[0]
        drawn = [np.random.PCG64(np.random.SeedSequence([self.seed, epoch, int(i), 7])).random_raw() for i in images]
        views = np.array([int(bits % np.uint64(count)) for bits in drawn])
        return np.where(views < 2, np.minimum(mirrored, count - 1), views)
