"""What a training step takes in: samples or their images' cached features, from any (epoch, step) on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from opencoca.data import Batch, SampleSource, TrainingLoader, TrainTransform
from opencoca.distributed.world import World
from opencoca.tasks.task import Task
from opencoca.tokenizer import Tokenizer
from opencoca.train.data_sources import training_order
from opencoca.train.feature_cache import FeatureCache
from opencoca.train.recipe.recipe import Recipe


class TrainBatches:
    """Endless, stateless supply: ``iterate(step)`` gives the batches of global step ``step`` and all that follow."""

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        source: SampleSource,
        tokenizer: Tokenizer,
        transform: TrainTransform,
        cache: FeatureCache | None,
        world: World,
    ):
        """cache: features that take the place of images. world: the processes that share out each batch."""
        order = training_order(source, recipe)
        self.loader = TrainingLoader(
            source,
            tokenizer,
            transform,
            order,
            recipe.batch_size,
            recipe.data.captions_per_image if task.reads_texts else 0,
            recipe.model.text.context_length,
            recipe.seed,
            recipe.data.num_workers,
            encode_target=task.encode_target,
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
        self.seed = recipe.seed
        self.cache = cache

    def iterate(self, step: int) -> Iterator[Batch]:
        """Batches from global step ``step`` on, without end."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        for batch in self.loader.batches(epoch, offset):
            epoch, offset = divmod(step, self.steps_per_epoch)
            share = {"rank": self.world.rank, "world_size": self.world.size}
            batch = replace(batch, micro_batch_sizes=self.order.micro_batch_sizes(offset, self.batch_size, **share))
            if self.cache is not None:
                assert batch.mirrored is not None
                samples = batch.sample_ids.numpy()
                features = self.cache.read(self._choose_views(samples, epoch, batch.mirrored.numpy()), samples)
                batch = replace(batch, images=features, from_stage=self.cache.stages)
            yield batch
            step += 1

    def _choose_views(self, images: np.ndarray, epoch: int, mirrored: np.ndarray) -> np.ndarray:
        """One view an image, (I,): a pure function of (seed, epoch, image)."""
        assert self.cache is not None
        count = self.cache.features.shape[0]
        drawn = [np.random.PCG64(np.random.SeedSequence([self.seed, epoch, int(i), 7])).random_raw() for i in images]
        views = np.array([int(bits % np.uint64(count)) for bits in drawn])
        return np.where(views < 2, np.minimum(mirrored, count - 1), views)
