"""CoCa's two losses, pure functions of tensors."""

from opencoca.losses.captioning import captioning_loss
from opencoca.losses.contrastive import contrastive_loss

__all__ = ["captioning_loss", "contrastive_loss"]
