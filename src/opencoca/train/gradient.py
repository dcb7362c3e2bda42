"""The gradient of a step's whole batch, in parts that fit memory, on every process its share.

A batch is cut into micro-batches (accumulation_steps), each with contrastive negatives of its own, and a micro-batch
into sub-batches (grad_cache_steps), which share their negatives: a first pass without graph collects all embeddings,
the loss gives the gradient by each, and a second pass takes it through the network, sub-batch by sub-batch (GradCache,
arXiv 2101.06983). Every process computes its part of each; the parts of losses and gradients add up.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opencoca.data.batch import Batch
from opencoca.losses import captioning_loss, contrastive_loss
from opencoca.model.coca import CoCaOutput
from opencoca.train.objective import Losses, autocast, run_model
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe.recipe import Recipe


class BatchLosses(NamedTuple):
    """Losses of a step's whole batch, detached, and its numbers of images and of tokens, over all processes."""

    losses: Losses
    images: int
    tokens: int


class _SubBatch(NamedTuple):
    """A part of a step; number: within the step, is_last: whether the step's last backward pass is of it."""

    batch: Batch
    number: int
    is_last: bool


class _EmbeddingGradient(NamedTuple):
    """The gradient of the weighted contrastive loss by one sub-batch's embeddings, and by the logit scale."""

    image_embed: Tensor
    text_embed: Tensor
    logit_scale: Tensor

    def backward_through(self, output: CoCaOutput) -> Tensor:
        """A scalar whose gradient takes this one through the network."""
        pairs = ((output.image_embed, self.image_embed), (output.text_embed, self.text_embed))
        terms = [(embed * grad).sum() for embed, grad in pairs if embed is not None]
        return torch.stack(terms).sum() + output.logit_scale * self.logit_scale


class BatchGradient:
    """Adds the gradient of a batch to the parameters' gradients."""

    def __init__(self, parallel: ParallelModel, recipe: Recipe):
        self.parallel, self.recipe, self.world = parallel, recipe, parallel.world

    def __call__(self, batch: Batch, step: int) -> BatchLosses:
        """Backward of all of batch, this process's part of step ``step``.

        A micro-batch's contrastive loss counts by its images, the captioning loss by its words. Dropout is a pure
        function of (seed, step, process, sub-batch).
        """
        recipe, per_micro = self.recipe, self.recipe.grad_cache_steps
        micro_batches = batch.micro_batches(recipe.accumulation_steps)
        parts = [part for micro in micro_batches for part in micro.split(per_micro)]
        *sizes, words, tokens = self.world.sum_counts(
            [part.num_samples for part in parts] + [batch.num_next_words, batch.num_tokens]
        )
        # Where no process has an image, none runs the network; where some have, all do.
        numbers = [number for number, size in enumerate(sizes) if size]
        values = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        for first in range(0, len(parts), per_micro):
            subs = [
                _SubBatch(parts[number].to(self.parallel.device), number, number == numbers[-1])
                for number in numbers
                if first <= number < first + per_micro
            ]
            if subs:
                share = sum(sizes[sub.number] for sub in subs) / sum(sizes)
                values += self._micro_batch(subs, share, words, step)
        self.parallel.finish_gradients()
        contrastive, caption = self.world.sum(values)
        weights = recipe.loss
        losses = Losses.of(
            contrastive if weights.contrastive_weight else None, caption if weights.caption_weight else None, weights
        )
        return BatchLosses(losses, sum(sizes), tokens)

    def _micro_batch(self, subs: list[_SubBatch], share: float, words: int, step: int) -> Tensor:
        """Backward of one micro-batch; its part (2,) of the contrastive and the captioning loss."""
        cached: list[_EmbeddingGradient] = []
        values = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        if len(subs) > 1 and self.recipe.loss.contrastive_weight:
            cached, values[0] = self._embedding_gradients(subs, share, step)
        for index, sub in enumerate(subs):
            values += self._sub_batch(sub, cached[index] if cached else None, share, words, step)
        return values

    def _sub_batch(
        self, sub: _SubBatch, cached: _EmbeddingGradient | None, share: float, words: int, step: int
    ) -> Tensor:
        """Forward and backward; the losses (2,) that are computed here and not by `_embedding_gradients`."""
        weights = self.recipe.loss
        values = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        terms = []
        self._seed(step, sub)
        with self.parallel.adding_up(sub.is_last):
            with autocast(self.parallel.device, self.recipe.precision):
                output = run_model(self.parallel.forward, sub.batch, weights)
                if cached is not None:
                    terms.append(cached.backward_through(output))
                elif output.image_embed is not None and output.text_embed is not None:
                    embeds = output.image_embed, output.text_embed, output.logit_scale
                    ids = sub.batch.sample_ids, sub.batch.text_sample_ids
                    contrastive = share * self._contrastive(*embeds, *ids)
                    terms.append(weights.contrastive_weight * contrastive)
                    values[0] = contrastive.detach()
                if output.hidden is not None:
                    caption = self._captioning(output, words)
                    terms.append(weights.caption_weight * caption)
                    values[1] = caption.detach()
            torch.stack(terms).sum().backward()
        return values

    def _embedding_gradients(
        self, subs: list[_SubBatch], share: float, step: int
    ) -> tuple[list[_EmbeddingGradient], Tensor]:
        """The first pass: the gradient by every sub-batch's embeddings, and the contrastive loss."""
        images, texts, scale = [], [], None
        with torch.no_grad(), autocast(self.parallel.device, self.recipe.precision):
            for sub in subs:
                self._seed(step, sub)
                output = run_model(self.parallel.forward, sub.batch, self.recipe.loss, captioning=False)
                images.append(output.image_embed)
                texts.append(output.text_embed)
                scale = output.logit_scale
        assert scale is not None
        all_images, all_texts = torch.cat(images), torch.cat(texts)
        leaves = [leaf.clone().requires_grad_() for leaf in (all_images, all_texts, scale)]
        image_ids = torch.cat([sub.batch.sample_ids for sub in subs])
        text_image_ids = torch.cat([sub.batch.text_sample_ids for sub in subs])
        contrastive = share * self._contrastive(leaves[0], leaves[1], leaves[2], image_ids, text_image_ids)
        weighted = self.recipe.loss.contrastive_weight * contrastive
        image_grad, text_grad, scale_grad = torch.autograd.grad(weighted, leaves)
        # The logit scale is one for all: the last sub-batch, whose gradients are added up, takes its gradient.
        scale_grads = [torch.zeros_like(scale)] * (len(subs) - 1) + [scale_grad]
        image_grads, text_grads = image_grad.split(list(map(len, images))), text_grad.split(list(map(len, texts)))
        parts = zip(image_grads, text_grads, scale_grads, strict=True)
        return [_EmbeddingGradient(*part) for part in parts], contrastive.detach()

    def _contrastive(
        self, images: Tensor, texts: Tensor, scale: Tensor, image_ids: Tensor, text_image_ids: Tensor
    ) -> Tensor:
        reduction = self.recipe.loss.contrastive_reduction
        return contrastive_loss(images, texts, scale, image_ids, text_image_ids, reduction=reduction, world=self.world)

    def _captioning(self, output: CoCaOutput, words: int) -> Tensor:
        """This sub-batch's part of the captioning loss over the ``words`` words of the whole batch."""
        options = self.recipe.loss
        assert output.hidden is not None
        assert output.next_ids is not None
        total = captioning_loss(
            output.hidden,
            output.next_ids,
            self.parallel.model.vocab_weight,
            label_smoothing=options.label_smoothing,
            reduction="sum",
        )
        return total / max(1, words) if options.caption_reduction == "mean" else total

    def _seed(self, step: int, sub: _SubBatch) -> None:
        """Both passes over a sub-batch draw the same random numbers."""
        source = np.random.SeedSequence([self.recipe.seed, step, self.world.rank, sub.number])
        torch.manual_seed(int(source.generate_state(1, np.uint64)[0]))
