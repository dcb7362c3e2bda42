"""One optimizer step: forward, both losses, backward, clip, check, update. No file, no clock, no printing."""

from collections.abc import Iterator
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
    """total = contrastive_weight * contrastive + caption_weight * caption; a loss of weight 0 is None."""

    total: Tensor
    contrastive: Tensor | None
    caption: Tensor | None


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
    total = torch.zeros((), device=batch.inputs.device)
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
        total = total + recipe.contrastive_weight * contrastive
    if output.hidden is not None and output.next_ids is not None:
        caption = captioning_loss(
            output.hidden,
            output.next_ids,
            model.lm_head.weight,
            label_smoothing=recipe.label_smoothing if label_smoothing is None else label_smoothing,
            reduction=recipe.caption_reduction,
        )
        total = total + recipe.caption_weight * caption
    return Losses(total, contrastive, caption)


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
        sums = self._accumulate_gradient(batch)
        norm = gradient_norm(self.parameters)
        if not (torch.isfinite(norm) and torch.isfinite(sums[0])):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLossError(
                f"step {step}: the loss is {float(sums[0])} and the gradient's norm {float(norm)}; no parameter was "
                "changed. Lower optimizer.learning_rate, set optimizer.grad_clip, or check the data."
            )
        if options.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, options.grad_clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        loss, contrastive, caption = (None if part is None else float(part) for part in sums)
        assert loss is not None
        lr = options.learning_rate * factor
        return StepMetrics(loss, contrastive, caption, float(norm), float(self.model.logit_scale), lr)

    def _accumulate_gradient(self, batch: TrainBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Backward of all micro-batches, each weighted by its share; the batch's mean losses."""
        parts: list[tuple[float, Losses]] = []
        for micro, share in self._micro_batches(batch):
            with autocast(micro.inputs.device, self.recipe.precision):
                losses = compute_losses(self.model, micro, self.recipe.loss)
            (losses.total * share).backward()
            parts.append((share, losses))

        def mean(values: list[Tensor | None]) -> Tensor | None:
            if any(value is None for value in values):
                return None
            return sum((share * v.detach() for (share, _), v in zip(parts, values, strict=True)), start=torch.zeros(()))

        total = mean([losses.total for _, losses in parts])
        assert total is not None
        return total, mean([losses.contrastive for _, losses in parts]), mean([losses.caption for _, losses in parts])

    def _micro_batches(self, batch: TrainBatch) -> Iterator[tuple[TrainBatch, float]]:
        for micro in batch.split(self.recipe.accumulation_steps):
            yield micro.to(self.parameters[0].device), len(micro.image_ids) / len(batch.image_ids)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
