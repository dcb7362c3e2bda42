"""The objective: one forward pass of the network, and the two losses of what comes out of it (paper, section 3.1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opencoca.data.batch import Batch
from opencoca.losses import captioning_loss, contrastive_loss
from opencoca.model.coca import CoCa, CoCaOutput
from opencoca.train.recipe.recipe import LossRecipe


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


def compute_losses(model: CoCa, batch: Batch, recipe: LossRecipe, label_smoothing: float | None = None) -> Losses:
    """One forward pass and both losses (paper, section 3.1); label_smoothing replaces the recipe's if given."""
    output = run_model(model, batch, recipe)
    contrastive = caption = None
    if output.image_embed is not None and output.text_embed is not None:
        contrastive = contrastive_loss(
            output.image_embed,
            output.text_embed,
            output.logit_scale,
            batch.sample_ids,
            batch.text_sample_ids,
            reduction=recipe.contrastive_reduction,
        )
    if output.hidden is not None and output.next_ids is not None:
        caption = captioning_loss(
            output.hidden,
            output.next_ids,
            model.vocab_weight,
            label_smoothing=recipe.label_smoothing if label_smoothing is None else label_smoothing,
            reduction=recipe.caption_reduction,
        )
    return Losses.of(contrastive, caption, recipe)


def run_model(
    forward: Callable[..., CoCaOutput], batch: Batch, recipe: LossRecipe, captioning: bool = True
) -> CoCaOutput:
    """The forward pass that the losses of non-zero weight need.

    Of an empty batch the outputs have no rows, but a graph: where processes gather weights and add up gradients
    together, each must run the network as often as the others.
    """
    shown = batch if batch.num_samples else batch.stand_in()
    output = forward(
        shown.images,
        shown.token_ids,
        shown.token_mask,
        from_stage=shown.from_stage,
        contrastive=recipe.contrastive_weight != 0,
        captioning=captioning and recipe.caption_weight != 0,
    )
    if shown is batch:
        return output
    rows = (None if tensor is None else tensor[:0] for tensor in output[:-1])
    return CoCaOutput(*rows, logit_scale=output.logit_scale)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
