"""Scores of the validation set while training: what `opencoca evaluate` computes, on cached features if there are any.

Several processes share the images out in whole batches, so that each computes what one process would, to the last bit.
Letters: S samples of a batch, C texts a sample.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opencoca.data import Batch, EvalTransform, SampleSource, Subset, collate_captions, iterate_images
from opencoca.distributed.world import World
from opencoca.evaluation.encoding import EncodedImages
from opencoca.evaluation.runner import Collected, Evaluator, Scores, collect
from opencoca.model.coca import CoCa
from opencoca.system.notice import Notice
from opencoca.tasks.task import Task, batch_losses
from opencoca.tokenizer import Tokenizer
from opencoca.train.compute import autocast
from opencoca.train.feature_cache import FeatureCache
from opencoca.train.recipe.recipe import Recipe

_BATCH_IMAGES = 50


@dataclass(frozen=True)
class ValidationScores:
    """The scores of one validation.

    values: by name (losses in nats, rates from 0 to 1); selection: the score that chooses the best weights.

    texts: what the model says of every image, by key; shown: the same for the few photographs that are followed over
    the run; kept: more that is stored with the best model, in JSON's types.
    """

    values: dict[str, float]
    selection: float
    texts: dict[str, str]
    shown: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)


class LossEvaluator:
    """Averages a task's losses over the images of a source, as training computes them."""

    def __init__(self, task: Task, source: SampleSource, tokenizer: Tokenizer, texts_per_sample: int):
        self.task, self.source, self.tokenizer = task.validated(), source, tokenizer
        self.texts_per_sample = texts_per_sample

    def rows(self, images: EncodedImages) -> tuple[int, dict[str, float]]:
        """The number of samples, and the losses by name."""
        losses = batch_losses(self.task, images.network, self._batch(images))
        terms = {f"{name}_loss": float(value) for name, value in losses.terms.items()}
        return len(images.indices), {"loss": float(losses.total), **terms}

    def scores(self, rows: Sequence[tuple[int, dict[str, float]]]) -> Scores:
        total = sum(count for count, _ in rows)
        return Scores({name: sum(count * values[name] for count, values in rows) / total for name in rows[0][1]})

    def _batch(self, images: EncodedImages) -> Batch:
        context_length = images.network.config.text.context_length
        per_sample = self.texts_per_sample
        texts = [text for i in images.indices for text in self.source.captions(i)[:per_sample]] if per_sample else []
        ids, mask = collate_captions(self.tokenizer.encode_batch(texts, context_length), self.tokenizer.pad_id)
        targets = None
        if (encode := self.task.encode_target) is not None:
            targets = torch.from_numpy(np.stack([encode(self.source.target(i)) for i in images.indices]))
        batch = Batch(
            sample_ids=torch.tensor(images.indices),
            images=None,
            token_ids=ids,
            token_mask=mask,
            targets=targets,
            from_stage=images.network.structure().image_encoder.num_stages,
        )
        return replace(batch.to(images.features.device), images=images.features)


class Validator:
    """Scores a model on the validation source."""

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        source: SampleSource,
        tokenizer: Tokenizer,
        transform: EvalTransform,
        cache: FeatureCache | None,
    ):
        self.recipe, self.task, self.source, self.transform = recipe, task, source, transform
        self.cache = cache
        broken = cache.broken if cache is not None else {}
        usable = [i for i in range(len(source)) if i not in broken]
        texts_per_sample = 0
        if task.reads_texts:
            # Extra captions of an image would have to be repeated for the others: all have as many as the fewest.
            usable = [i for i in usable if source.captions(i)]
            texts_per_sample = min((len(source.captions(i)) for i in usable), default=0)
        self.images = usable
        self._named: set[int] = set()
        """Images that turned out to be unreadable, of which a warning has been given."""
        losses = LossEvaluator(task, source, tokenizer, texts_per_sample)
        self.evaluators: tuple[Evaluator, ...] = (losses, *task.evaluators(source, tokenizer))
        self.shown_keys = fixed_photographs(source, usable, recipe.report_images)

    def __call__(self, model: CoCa) -> ValidationScores:
        return self.scores([self.part(model)])

    def part(self, model: CoCa, rank: int = 0, num_ranks: int = 1) -> Collected:
        """What the evaluators find in the share of process ``rank``; all shares, in order, are the source."""
        was_training, device = model.training, model.device
        model.eval()
        try:
            with autocast(device, self.recipe.precision):
                return collect(self._batches(model, device, rank, num_ranks), self.evaluators)
        finally:
            model.train(was_training)

    def scores(self, parts: list[Collected]) -> ValidationScores:
        """The scores of what all processes found, by rank."""
        by_evaluator = zip(self.evaluators, *(part.rows for part in parts), strict=True)
        found = Scores.joined(
            evaluator.scores([row for rows in of_ranks for row in rows]) for evaluator, *of_ranks in by_evaluator
        )
        shown = {key: found.texts[key] for key in self.shown_keys if key in found.texts}
        return ValidationScores(found.values, self.task.selection(found.values), found.texts, shown, found.kept)

    def _batches(self, model: CoCa, device: torch.device, rank: int, num_ranks: int) -> Iterator[EncodedImages]:
        for ids, inputs, stage in self._inputs(rank, num_ranks):
            inputs = inputs.to(device)
            inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
            yield EncodedImages(tuple(ids), model, model.image_features(inputs, stage))

    def _inputs(self, rank: int, num_ranks: int) -> Iterator[tuple[list[int], Tensor, int]]:
        """Yields positions in the source, inputs, and the number of the encoder's stage that takes the inputs."""
        if self.cache is not None:
            first, stop = _share(len(self.images), rank, num_ranks)
            for start in range(first, stop, _BATCH_IMAGES):
                ids = self.images[start : min(start + _BATCH_IMAGES, stop)]
                yield ids, self.cache.read(np.zeros(len(ids), dtype=int), np.array(ids)), self.cache.stages
            return
        wanted = set(self.images)
        first, stop = _share(len(self.source), rank, num_ranks)
        source = self.source if num_ranks == 1 else Subset(self.source, range(first, stop))
        for batch in iterate_images(source, self.transform, _BATCH_IMAGES, 2):
            self._name_broken([(first + index, reason) for index, reason in batch.errors])
            indices = (batch.indices + first).tolist()
            rows = [row for row, image in enumerate(indices) if image in wanted]
            if rows:
                yield [indices[row] for row in rows], batch.pixels[rows], 0

    def _name_broken(self, errors: list[tuple[int, str]]) -> None:
        for index, reason in errors:
            if index not in self._named:
                self._named.add(index)
                warnings.warn(f"{reason}; validation leaves it out", Notice, stacklevel=2)


def headline(task: Task, values: dict[str, float], epoch: float) -> str:
    """The scores that a person follows, on one line."""
    shown = [score for score in task.scores if score.headline and score.name in values]
    parts = [f"{score.label} {score.factor * values[score.name]:.2f}" for score in shown]
    return f"epoch {epoch:g}: " + "  ".join(parts)


def shared_scores(
    validator: Validator, model: CoCa, world: World, unless_asked: Callable[[Callable[[], Any]], Any]
) -> ValidationScores | None:
    """The scores in the main process, None in the others; all must call, each with the whole model.

    unless_asked: does work, or gives it up and returns None. If it does so in any process there are no scores.
    """
    if world.size == 1:
        return unless_asked(lambda: validator(model))
    parts = world.gather_results(unless_asked(lambda: validator.part(model, world.rank, world.size)))
    if not world.is_main or any(part is None for part in parts):
        return None
    return unless_asked(lambda: validator.scores(parts))


def _share(count: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The first of ``count`` images that a process takes and the one after its last; a share is whole batches."""
    batches = -(-count // _BATCH_IMAGES)
    first, stop = (batches * number // num_ranks * _BATCH_IMAGES for number in (rank, rank + 1))
    return min(count, first), min(count, stop)


def fixed_photographs(source: SampleSource, usable: list[int], count: int) -> list[str]:
    """Keys of so many usable images, evenly spaced: the same ones in every run on this source."""
    count = min(count, len(usable))
    return [source.key(usable[number * len(usable) // count]) for number in range(count)]
