"""Scores of the validation set while training: the metrics of `opencoca evaluate`, on cached features if there are.

Letters: I images, B captions, E embed_dim.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opencoca.data import EvalTransform, ImageTextSource, collate_captions, iterate_images
from opencoca.evaluation.caption_metrics import caption_scores
from opencoca.evaluation.retrieval_metrics import retrieval_scores
from opencoca.generation import GenerationOptions, generate
from opencoca.model.coca import CoCa
from opencoca.tokenizer import Tokenizer
from opencoca.train.batches import TrainBatch
from opencoca.train.feature_cache import FeatureCache
from opencoca.train.objective import autocast, compute_losses
from opencoca.train.recipe import Recipe

_BATCH_IMAGES = 50


@dataclass(frozen=True)
class ValidationScores:
    """scores: metric name -> value (losses in nats, rates and CIDEr-D from 0); captions: of every image, by key.

    shown: those of the few photographs whose captions are followed over the run.
    """

    scores: dict[str, float]
    captions: dict[str, str]
    shown: dict[str, str] = field(default_factory=dict)

    def selection(self, select_by: str) -> float:
        """The number that the best weights have the most of."""
        scores = self.scores
        r1 = [scores[name] for name in ("image_to_text_r1", "text_to_image_r1") if name in scores]
        if select_by == "loss":
            return -scores["loss"]
        if select_by == "cider_d":
            return scores["cider_d"]
        if select_by == "mean_r1":
            return float(np.mean(r1))
        return 100 * (scores.get("cider_d", 0.0) + sum(r1))


class Validator:
    """Scores a model on the validation source."""

    def __init__(
        self,
        recipe: Recipe,
        source: ImageTextSource,
        tokenizer: Tokenizer,
        transform: EvalTransform,
        cache: FeatureCache | None,
        cached_stages: int,
    ):
        self.recipe, self.source, self.tokenizer, self.transform = recipe, source, tokenizer, transform
        self.cache, self.cached_stages = cache, cached_stages
        if not any(source.captions(image) for image in range(len(source))):
            raise ValueError(
                "none of the validation images has a caption; set data.val_captions, or no data.val_images"
            )
        self.options = GenerationOptions(max_new_tokens=recipe.val_max_new_tokens)
        self.shown_keys = fixed_photographs(source, recipe.report_images)

    @torch.no_grad()
    def __call__(self, model: CoCa) -> ValidationScores:
        was_training = model.training
        model.eval()
        try:
            return self._score(model)
        finally:
            model.train(was_training)

    def _score(self, model: CoCa) -> ValidationScores:
        wants = self.recipe.loss
        image_embeds, text_embeds, image_of_text, losses = [], [], [], []
        captions: dict[str, str] = {}
        device = next(model.parameters()).device
        for batch in self._batches(model.config.text.context_length):
            batch = batch.to(device)
            with autocast(device, self.recipe.precision):
                features = model.image_encoder.run_stages(
                    batch.inputs, batch.from_stage, model.image_encoder.num_stages
                )
                image = model.pool_image(features)
                batch = TrainBatch(features, model.image_encoder.num_stages, *_rest(batch))
                losses.append((len(batch.image_ids), self._losses(model, batch)))
                if wants.contrastive_weight:
                    image_embeds.append(image.embed)
                    text_embeds.append(model.encode_text(batch.token_ids, batch.token_mask).embed)
                if wants.caption_weight:
                    written = generate(model, image.tokens, self.tokenizer, self.options)
                    keys = [self.source.key(int(i)) for i in batch.image_ids]
                    captions.update(zip(keys, (found[0].text for found in written), strict=True))
            texts_per_image = len(batch.token_ids) // len(batch.image_ids)
            image_of_text.append(batch.image_ids.repeat_interleave(texts_per_image))
        scores = _mean_losses(losses)
        if wants.contrastive_weight:
            texts = torch.cat(image_of_text)
            texts = torch.unique(texts, return_inverse=True)[1]
            scores |= _numbers(asdict(retrieval_scores(torch.cat(image_embeds), torch.cat(text_embeds), texts)))
        if wants.caption_weight:
            references = {self.source.key(i): self.source.captions(i) for i in range(len(self.source))}
            references = {key: references[key] for key in captions}
            scores |= _numbers(asdict(caption_scores(captions, references)))
        return ValidationScores(scores, captions, {key: captions[key] for key in self.shown_keys if key in captions})

    def _losses(self, model: CoCa, batch: TrainBatch) -> dict[str, float]:
        losses = compute_losses(model, batch, self.recipe.loss, label_smoothing=0.0)
        named = {"loss": losses.total, "contrastive_loss": losses.contrastive, "caption_loss": losses.caption}
        return {name: float(value) for name, value in named.items() if value is not None}

    def _batches(self, context_length: int) -> Iterator[TrainBatch]:
        """Readable images that have captions, with the same number of captions each (extra ones would repeat)."""
        counts = [len(self.source.captions(i)) for i in range(len(self.source))]
        broken = self.cache.broken if self.cache is not None else {}
        images = [i for i, count in enumerate(counts) if count and i not in broken]
        texts_per_image = min(counts[i] for i in images)
        for ids, inputs, stage in self._inputs(images):
            texts = [caption for i in ids for caption in self.source.captions(i)[:texts_per_image]]
            token_ids, token_mask = collate_captions(
                self.tokenizer.encode_batch(texts, context_length), self.tokenizer.pad_id
            )
            yield TrainBatch(inputs, stage, torch.tensor(ids), token_ids, token_mask)

    def _inputs(self, images: list[int]) -> Iterator[tuple[list[int], Tensor, int]]:
        if self.cache is not None:
            for start in range(0, len(images), _BATCH_IMAGES):
                ids = images[start : start + _BATCH_IMAGES]
                yield ids, self.cache.read(np.zeros(len(ids), dtype=int), np.array(ids)), self.cached_stages
            return
        wanted = set(images)
        for batch in iterate_images(self.source, self.transform, _BATCH_IMAGES, 2):
            rows = [row for row, image in enumerate(batch.indices.tolist()) if image in wanted]
            if rows:
                yield [int(batch.indices[row]) for row in rows], batch.pixels[rows], 0


def fixed_photographs(source: ImageTextSource, count: int) -> list[str]:
    """Keys of so many images that have captions, evenly spaced: the same ones in every run on this source."""
    keys = [source.key(image) for image in range(len(source)) if source.captions(image)]
    return [keys[number * len(keys) // min(count, len(keys))] for number in range(min(count, len(keys)))]


def _rest(batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.image_ids, batch.token_ids, batch.token_mask


def _mean_losses(losses: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    total = sum(count for count, _ in losses)
    return {name: sum(count * values[name] for count, values in losses) / total for name in losses[0][1]}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
