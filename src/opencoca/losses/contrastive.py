"""The contrastive loss: images and texts that belong together are more alike than those that do not.

Paper, section 3.1, equation 1. Letters: I images, B texts, E embed_dim.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_embed: Tensor,
    text_embed: Tensor,
    logit_scale: Tensor | float,
    image_ids: Tensor | None = None,
    text_image_ids: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Symmetric InfoNCE with several texts an image; a scalar.

    image_embed (I, E) and text_embed (B, E), of length 1; logit_scale = 1 / temperature.
    image_ids (I,): which image each row is (default: all differ). text_image_ids (B,): which image each text
    describes (default: B / I consecutive texts an image). Rows with equal ids are positives of one another and never
    each other's negatives: the loss of a pair compares it with the true negatives alone.
    reduction: ``mean`` averages over pairs and over the two directions, as common implementations do; ``sum`` adds the
    two directions, each averaged over pairs, as the paper's formula does.
    Raises ValueError if a text describes an image that is not there, and for another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither mean nor sum")
    num_images, num_texts = image_embed.shape[0], text_embed.shape[0]
    if image_ids is None:
        image_ids = torch.arange(num_images, device=image_embed.device)
    if text_image_ids is None:
        if num_texts % num_images:
            raise ValueError(f"{num_texts} texts cannot be shared out evenly among {num_images} images")
        text_image_ids = image_ids.repeat_interleave(num_texts // num_images)
    is_pair = text_image_ids[:, None] == image_ids[None, :]
    if not bool(is_pair.any(dim=1).all()):
        raise ValueError("a text describes an image that is not in the batch")
    logits = logit_scale * text_embed @ image_embed.T
    text_to_image = _pair_losses(logits, is_pair)
    image_to_text = _pair_losses(logits.T, is_pair.T).T
    # A text has several pairs only where its image stands in the batch more than once; an image, one a caption.
    weights = is_pair / is_pair.sum()
    both = ((text_to_image + image_to_text) * weights).sum()
    return both / 2 if reduction == "mean" else both


def _pair_losses(logits: Tensor, is_pair: Tensor) -> Tensor:
    """-log softmax of every pair against its row's negatives alone, (rows, columns); zero where there is no pair."""
    negatives = logits.masked_fill(is_pair, float("-inf")).logsumexp(dim=1, keepdim=True)
    # log(1 + exp(negatives - logit)): the pair itself is the only positive in its own softmax.
    losses = F.softplus(negatives - logits)
    return losses.masked_fill(~is_pair, 0.0)
