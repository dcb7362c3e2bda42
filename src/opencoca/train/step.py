"""One optimizer step: forward, both losses, backward, clip, check, update. No file, no clock, no printing."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from opencoca.losses import captioning_loss, contrastive_loss
from opencoca.model.coca import CoCa
from opencoca.train.batches import TrainBatch
from opencoca.train.optimizer import WeightAverage, gradient_norm, learning_rate_factor, set_learning_rate
from opencoca.train.recipe import LossRecipe, Recipe


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is not a number or infinite; no parameter was changed."""


@dataclass(frozen=True)
class Losses:
    """total = contrastive_weight * contrastive + caption_weight * caption; a loss of weight 0 is None. Scalars."""

    total: Tensor
    contrastive: Tensor | None
    caption: Tensor | None

    @staticmethod
    def of(contrastive: Tensor | None, caption: Tensor | None, recipe: LossRecipe) -> "Losses":
        parts = [(recipe.contrastive_weight, contrastive), (recipe.caption_weight, caption)]
        terms = [weight * loss for weight, loss in parts if loss is not None]
        assert terms, "both losses have weight 0"
        return Losses(torch.stack(terms).sum(), contrastive, caption)

    def weighted(self, recipe: LossRecipe, image_share: float, word_share: float) -> "Losses":
        """What these losses of a micro-batch contribute to the batch's; sums over words contribute whole."""
        word_share = word_share if recipe.caption_reduction == "mean" else 1.0
        contrastive = None if self.contrastive is None else image_share * self.contrastive
        return Losses.of(contrastive, None if self.caption is None else word_share * self.caption, recipe)

    def detached(self) -> "Losses":
        parts = (self.contrastive, self.caption)
        return Losses(self.total.detach(), *(None if part is None else part.detach() for part in parts))

    def plus(self, other: "Losses") -> "Losses":
        return Losses(
            self.total + other.total,
            None if self.contrastive is None or other.contrastive is None else self.contrastive + other.contrastive,
            None if self.caption is None or other.caption is None else self.caption + other.caption,
        )


@dataclass(frozen=True)
class StepMetrics:
    """What one step gave. Losses in nats; lr is that of the main group."""

    loss: float
    contrastive_loss: float | None
    caption_loss: float | None
    grad_norm: float
    logit_scale: float
    lr: float

    def to_dict(self) -> dict[str, float]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def compute_losses(model: CoCa, batch: TrainBatch, recipe: LossRecipe, label_smoothing: float | None = None) -> Losses:
    """One forward pass and both losses (paper, section 3.1); label_smoothing replaces the recipe's if given."""
    output = model(
        batch.inputs,
        batch.token_ids,
        batch.token_mask,
        from_stage=batch.from_stage,
        contrastive=recipe.contrastive_weight != 0,
        captioning=recipe.caption_weight != 0,
    )
    contrastive = caption = None
    if output.image_embed is not None and output.text_embed is not None:
        texts_per_image = len(batch.token_ids) // len(batch.image_ids)
        contrastive = contrastive_loss(
            output.image_embed,
            output.text_embed,
            output.logit_scale,
            batch.image_ids,
            batch.image_ids.repeat_interleave(texts_per_image),
            reduction=recipe.contrastive_reduction,
        )
    if output.hidden is not None and output.next_ids is not None:
        caption = captioning_loss(
            output.hidden,
            output.next_ids,
            model.lm_head.weight,
            label_smoothing=recipe.label_smoothing if label_smoothing is None else label_smoothing,
            reduction=recipe.caption_reduction,
        )
    return Losses.of(contrastive, caption, recipe)


class TrainStep:
    """Applies one batch to the model."""

    def __init__(self, model: CoCa, optimizer: torch.optim.Optimizer, average: WeightAverage | None, recipe: Recipe):
        self.model, self.optimizer, self.average, self.recipe = model, optimizer, average, recipe
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self, batch: TrainBatch, step: int, total_steps: int) -> StepMetrics:
        """Step number ``step`` (from 0) of ``total_steps``.

        Raises NonFiniteLossError before any parameter or optimizer state has changed.
        """
        options = self.recipe.optimizer
        factor = learning_rate_factor(step, total_steps, options)
        set_learning_rate(self.optimizer, factor)
        losses = self._accumulate_gradient(batch)
        norm = gradient_norm(self.parameters)
        if not (torch.isfinite(norm) and torch.isfinite(losses.total)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLossError(
                f"step {step}: the loss is {float(losses.total)} and the gradient's norm {float(norm)}; no parameter "
                "was changed. Lower optimizer.learning_rate, set optimizer.grad_clip, or check the data."
            )
        if options.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, options.grad_clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_logit_scale()
        if self.average is not None:
            self.average.update(self.model)
        return StepMetrics(
            loss=float(losses.total),
            contrastive_loss=None if losses.contrastive is None else float(losses.contrastive),
            caption_loss=None if losses.caption is None else float(losses.caption),
            grad_norm=float(norm),
            logit_scale=float(self.model.logit_scale.detach()),
            lr=options.learning_rate * factor,
        )

    def _accumulate_gradient(self, batch: TrainBatch) -> Losses:
        """Backward of all micro-batches; the losses of the whole batch, detached.

        The captioning loss of a micro-batch counts by its words, so that the gradient is the whole batch's.
        """
        device = self.parameters[0].device
        words = int(batch.token_mask.sum()) - len(batch.token_mask)
        sums: Losses | None = None
        for micro in batch.split(self.recipe.accumulation_steps):
            image_share = len(micro.image_ids) / len(batch.image_ids)
            word_share = (int(micro.token_mask.sum()) - len(micro.token_mask)) / max(1, words)
            micro = micro.to(device)
            with autocast(device, self.recipe.precision):
                losses = compute_losses(self.model, micro, self.recipe.loss)
            losses = losses.weighted(self.recipe.loss, image_share, word_share)
            losses.total.backward()
            sums = losses.detached() if sums is None else sums.plus(losses.detached())
        assert sums is not None
        return sums


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
