"""Where the real words of a padded batch stand, so that only they are computed.

Layers that act on one position at a time (norms, projections, MLPs) run on the packed words (S, D);
attention, which needs rows, pads and packs again. With real captions this saves about half of the text's work.
Letters: B batch, T text positions, S real positions of the whole batch, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextLayout:
    """The real positions of a batch of texts, row by row.

    batch_size, length: B and T of the padded form; rows are padded at their end.
    slots: (S,) where each real position stands in the flattened (B * T) padded form, None if all are real.
    positions: (S,) position of each within its text, from 0.
    """

    batch_size: int
    length: int
    slots: Tensor | None
    positions: Tensor

    @staticmethod
    def from_mask(token_mask: Tensor) -> "TextLayout":
        """Layout of token_mask (B, T), True = real. Padding may stand anywhere; it is moved to the end."""
        batch_size, width = token_mask.shape
        lengths = token_mask.sum(dim=1)
        length = int(lengths.max()) if batch_size else 0
        if int(lengths.sum()) == batch_size * width:
            return TextLayout.dense(batch_size, width, token_mask.device)
        rank = token_mask.cumsum(dim=1) - 1
        rows = torch.arange(batch_size, device=token_mask.device).unsqueeze(1)
        slots = (rows * length + rank)[token_mask]
        return TextLayout(batch_size, length, slots, rank[token_mask])

    @staticmethod
    def dense(batch_size: int, length: int, device: torch.device | str, start: int = 0) -> "TextLayout":
        """Layout without padding whose rows begin at position ``start``."""
        positions = torch.arange(start, start + length, device=device).repeat(batch_size)
        return TextLayout(batch_size, length, None, positions)

    def pad(self, packed: Tensor) -> Tensor:
        """(S, ...) -> (B, T, ...), zeros where there is no word."""
        shape = (self.batch_size, self.length, *packed.shape[1:])
        if self.slots is None:
            return packed.reshape(shape)
        padded = packed.new_zeros(self.batch_size * self.length, *packed.shape[1:])
        return padded.index_copy(0, self.slots, packed).view(shape)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (S, ...)."""
        flat = padded.reshape(self.batch_size * self.length, *padded.shape[2:])
        return flat if self.slots is None else flat.index_select(0, self.slots)
