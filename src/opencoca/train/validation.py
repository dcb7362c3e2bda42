"""Scores of the validation set while training: the metrics of `opencoca evaluate`, on cached features if there are.

Several processes share the images out in whole batches, so that each computes what one process would, to the last bit.
Letters: I images, B captions, E embed_dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opencoca.data import EvalTransform, SampleSource, Subset, collate_captions, iterate_images
from opencoca.data.batch import Batch
from opencoca.distributed.world import World
from opencoca.evaluation.caption_metrics import caption_scores
from opencoca.evaluation.retrieval_metrics import retrieval_scores
from opencoca.generation import GenerationOptions, generate
from opencoca.generation.decoding.session import DecodingSession
from opencoca.model.coca import CoCa
from opencoca.tokenizer import Tokenizer
from opencoca.train.feature_cache import FeatureCache
from opencoca.train.objective import autocast, compute_losses
from opencoca.train.recipe.recipe import Recipe

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

    def line(self, epoch: float) -> str:
        """The scores that a person follows, on one line."""
        shown = {
            "val loss": ("loss", 1),
            "CIDEr-D": ("cider_d", 100),
            "BLEU-4": ("bleu_4", 100),
            "i2t R@1": ("image_to_text_r1", 100),
            "t2i R@1": ("text_to_image_r1", 100),
        }
        parts = [f"{k} {f * self.scores[name]:.2f}" for k, (name, f) in shown.items() if name in self.scores]
        return f"epoch {epoch:g}: " + "  ".join(parts)


@dataclass
class ValidationPart:
    """What one process found on its batches, on the CPU.

    losses: of each batch, how many images it has and its losses by name. image_embeds and text_embeds: of each batch,
    (I, E) and (B, E). image_of_text: of each batch, (B,) positions in the source. captions: by key.
    """

    losses: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    image_embeds: list[Tensor] = field(default_factory=list)
    text_embeds: list[Tensor] = field(default_factory=list)
    image_of_text: list[Tensor] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def joined(parts: "list[ValidationPart]") -> "ValidationPart":
        """The parts one behind the other, as one process would have found them."""
        whole = ValidationPart()
        for part in parts:
            whole.losses += part.losses
            whole.image_embeds += part.image_embeds
            whole.text_embeds += part.text_embeds
            whole.image_of_text += part.image_of_text
            whole.captions |= part.captions
        return whole


class Validator:
    """Scores a model on the validation source."""

    def __init__(
        self,
        recipe: Recipe,
        source: SampleSource,
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

    def __call__(self, model: CoCa) -> ValidationScores:
        return self.scores([self.part(model)], model.device)

    @torch.no_grad()
    def part(self, model: CoCa, rank: int = 0, num_ranks: int = 1) -> ValidationPart:
        """What this model makes of the batches of process ``rank``; those of all, in order, are the whole source's."""
        was_training = model.training
        model.eval()
        try:
            return self._part(model, rank, num_ranks)
        finally:
            model.train(was_training)

    def scores(self, parts: list[ValidationPart], device: torch.device) -> ValidationScores:
        """The scores of what all processes found, by rank; device: where embeddings are compared."""
        wants, found = self.recipe.loss, ValidationPart.joined(parts)
        scores = _mean_losses(found.losses)
        if wants.contrastive_weight:
            texts = torch.unique(torch.cat(found.image_of_text), return_inverse=True)[1]
            image_embed, text_embed = torch.cat(found.image_embeds).to(device), torch.cat(found.text_embeds).to(device)
            scores |= _numbers(asdict(retrieval_scores(image_embed, text_embed, texts)))
        captions = found.captions
        if wants.caption_weight:
            references = {self.source.key(i): self.source.captions(i) for i in range(len(self.source))}
            references = {key: references[key] for key in captions}
            scores |= _numbers(asdict(caption_scores(captions, references)))
        return ValidationScores(scores, captions, {key: captions[key] for key in self.shown_keys if key in captions})

    def _part(self, model: CoCa, rank: int, num_ranks: int) -> ValidationPart:
        wants, found = self.recipe.loss, ValidationPart()
        session = DecodingSession(model)
        device = next(model.parameters()).device
        for batch in self._batches(model.config.text.context_length, rank, num_ranks):
            batch = batch.to(device)
            assert batch.images is not None
            with autocast(device, self.recipe.precision):
                features = model.image_features(batch.images, batch.from_stage)
                image = model.pool_image(features)
                batch = replace(batch, images=features, from_stage=model.structure().image_encoder.num_stages)
                found.losses.append((batch.num_samples, self._losses(model, batch)))
                if wants.contrastive_weight:
                    found.image_embeds.append(image.embed.cpu())
                    found.text_embeds.append(model.encode_text(batch.token_ids, batch.token_mask).embed.cpu())
                if wants.caption_weight:
                    written = generate(model, image.tokens, self.tokenizer, self.options, session=session)
                    keys = [self.source.key(int(i)) for i in batch.sample_ids]
                    found.captions.update(zip(keys, (texts[0].text for texts in written), strict=True))
            found.image_of_text.append(batch.text_sample_ids.cpu())
        return found

    def _losses(self, model: CoCa, batch: Batch) -> dict[str, float]:
        losses = compute_losses(model, batch, self.recipe.loss, label_smoothing=0.0)
        named = {"loss": losses.total, "contrastive_loss": losses.contrastive, "caption_loss": losses.caption}
        return {name: float(value) for name, value in named.items() if value is not None}

    def _batches(self, context_length: int, rank: int, num_ranks: int) -> Iterator[Batch]:
        """Readable images that have captions, with the same number of captions each (extra ones would repeat)."""
        counts = [len(self.source.captions(i)) for i in range(len(self.source))]
        broken = self.cache.broken if self.cache is not None else {}
        images = [i for i, count in enumerate(counts) if count and i not in broken]
        texts_per_image = min(counts[i] for i in images)
        for ids, inputs, stage in self._inputs(images, rank, num_ranks):
            texts = [caption for i in ids for caption in self.source.captions(i)[:texts_per_image]]
            token_ids, token_mask = collate_captions(
                self.tokenizer.encode_batch(texts, context_length), self.tokenizer.pad_id
            )
            yield Batch(torch.tensor(ids), inputs, token_ids, token_mask, from_stage=stage)

    def _inputs(self, images: list[int], rank: int, num_ranks: int) -> Iterator[tuple[list[int], Tensor, int]]:
        if self.cache is not None:
            first, stop = _share(len(images), rank, num_ranks)
            for start in range(first, stop, _BATCH_IMAGES):
                ids = images[start : min(start + _BATCH_IMAGES, stop)]
                yield ids, self.cache.read(np.zeros(len(ids), dtype=int), np.array(ids)), self.cached_stages
            return
        wanted = set(images)
        first, stop = _share(len(self.source), rank, num_ranks)
        source = self.source if num_ranks == 1 else Subset(self.source, range(first, stop))
        for batch in iterate_images(source, self.transform, _BATCH_IMAGES, 2):
            indices = (batch.indices + first).tolist()
            rows = [row for row, image in enumerate(indices) if image in wanted]
            if rows:
                yield [indices[row] for row in rows], batch.pixels[rows], 0


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
    return unless_asked(lambda: validator.scores(parts, model.device))


def _share(count: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The first of ``count`` things that a process takes and the one after its last: whole batches in a row."""
    batches = -(-count // _BATCH_IMAGES)
    first, stop = (batches * number // num_ranks * _BATCH_IMAGES for number in (rank, rank + 1))
    return min(count, first), min(count, stop)


def fixed_photographs(source: SampleSource, count: int) -> list[str]:
    """Keys of so many images that have captions, evenly spaced: the same ones in every run on this source."""
    keys = [source.key(image) for image in range(len(source)) if source.captions(image)]
    return [keys[number * len(keys) // min(count, len(keys))] for number in range(min(count, len(keys)))]


def _mean_losses(losses: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    total = sum(count for count, _ in losses)
    return {name: sum(count * values[name] for count, values in losses) / total for name in losses[0][1]}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
