"""Where the real words of a padded batch stand, so that only they are computed.

Layers that act on one position at a time (norms, projections, MLPs) run on the packed words (S, D);
attention, which needs rows, pads and packs again. With real captions this saves about half of the text's work.
Letters: B batch, T text positions, S real positions of the whole batch, D width.
"""

from dataclasses import dataclass
from typing import Any

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
        if self.slots is not None:
            packed = put_rows(packed, self.slots, self.batch_size * self.length)
        return packed.reshape(self.batch_size, self.length, *packed.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (S, ...)."""
        flat = padded.reshape(self.batch_size * self.length, *padded.shape[2:])
        return flat if self.slots is None else take_rows(flat, self.slots)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x (R, ...) and distinct rows (S,) -> (S, ...)."""
    return _TakeRows.apply(x, rows)


def put_rows(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """x (S, ...) and distinct rows (S,) -> (num_rows, ...) with x in these rows and zeros in the others."""
    return _PutRows.apply(x, rows, num_rows)


class _TakeRows(torch.autograd.Function):
    # The general gather must add up gradients of rows that were taken twice; knowing that none is, we copy.
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _put(grad_outputs[0], ctx.saved_tensors[0], ctx.num_rows), None


class _PutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(rows)
        return _put(x, rows, num_rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0].index_select(0, ctx.saved_tensors[0]), None, None


def _put(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, x)
