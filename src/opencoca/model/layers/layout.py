"""Where the real words of a padded batch stand, so that only they are computed.

Layers that act on one position at a time (norms, projections, MLPs) run on the packed words (S, D);
attention, which needs rows, pads and packs again. With real captions this saves about half of the text's work.
Letters: B batch, T text positions, S real positions of the whole batch, D width.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opencoca.model.kernels.choice import Mask
from opencoca.model.kernels.packed_attention import Buckets


@dataclass(frozen=True)
class TextLayout:
    """The real positions of a batch of texts, row by row.

    batch_size, length: B and T of the padded form; rows are padded at their end.
    slots: (S,) where each real position stands in the flattened (B * T) padded form, None if all are real.
    positions: (S,) position of each within its text, from 0.
    visible: (B, N) which of the N positions (cached ones included) attention may see; None = all real ones. Where
        texts share a cache row: (rows, texts of a row x T, N), for each position what it may see.
    """

    batch_size: int
    length: int
    slots: Tensor | None
    positions: Tensor
    visible: Tensor | None = None

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

    @cached_property
    def lengths(self) -> Tensor:
        """(B,) real positions of each text."""
        if self.slots is None:
            return torch.full((self.batch_size,), self.length, device=self.positions.device)
        return torch.bincount(self.slots // self.length, minlength=self.batch_size)

    @cached_property
    def buckets(self) -> Buckets:
        """The texts with their like, for attention on a CPU."""
        return Buckets.by_length(self.lengths)

    @cached_property
    def hidden(self) -> Tensor | None:
        """(S,) which real positions attention does not see, where there are no cached ones; None = it sees all."""
        return None if self.visible is None else ~self.pack(self.visible)

    def mask(self, mask: Mask) -> Mask:
        """The mask over padded texts: what this layout hides is hidden, and so is padding where it could be seen."""
        visible = self.visible
        if visible is None and mask.kind != "causal" and self.slots is not None:
            visible = torch.arange(self.length, device=self.positions.device) < self.lengths[:, None]
        if visible is None:
            return mask
        seen = visible[:, None] & mask.visible if mask.visible is not None else visible
        return mask._replace(visible=seen)

    def image_buckets(self, group: int) -> Buckets:
        """Rows of ``group`` consecutive texts, all texts of one image, one after another without gaps."""
        if group not in self._image_buckets:
            self._image_buckets[group] = Buckets.single(self.words_per_image(group))
        return self._image_buckets[group]

    def words_per_image(self, group: int) -> Tensor:
        """(B / group,) words of the consecutive texts that each image has."""
        return self.lengths.view(-1, group).sum(dim=1)

    @cached_property
    def _image_buckets(self) -> dict[int, Buckets]:
        return {}

    def pad(self, packed: Tensor) -> Tensor:
        """(S, ...) -> (B, T, ...), zeros where there is no word."""
        if self.slots is not None:
            packed = put_rows(packed, self.slots, self.batch_size * self.length)
        return packed.reshape(self.batch_size, self.length, *packed.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (S, ...)."""
        flat = padded.reshape(self.batch_size * self.length, *padded.shape[2:])
        return flat if self.slots is None else take_rows(flat, self.slots)

    def pad_heads(self, packed: Tensor, parts: int, head_dim: int, group: int = 1) -> Tensor:
        """(S, parts * H * d) -> (parts, B / group, H, group * T, d): padded and split into heads in one copy.

        parts: how many kinds of vectors lie side by side (keys and values: 2). group: consecutive texts that attend
        as one, their positions in a row.
        """
        num_heads = packed.shape[1] // (parts * head_dim)
        shape = (parts, self.batch_size // group, num_heads, group * self.length, head_dim)
        if self.slots is None:
            split = packed.view(shape[1], shape[3], parts, num_heads, head_dim)
            return split.permute(2, 0, 3, 1, 4)
        slots = self._head_slots(self.slots, parts, num_heads, group)
        return put_rows(packed.reshape(-1, head_dim), slots, math.prod(shape[:4])).view(shape)

    def pack_heads(self, padded: Tensor, group: int = 1) -> Tensor:
        """(B / group, H, group * T, d) -> (S, H * d): the inverse of `pad_heads` for one part."""
        num_heads, head_dim = padded.shape[1], padded.shape[3]
        if self.slots is None:
            return padded.transpose(1, 2).reshape(self.batch_size * self.length, num_heads * head_dim)
        slots = self._head_slots(self.slots, 1, num_heads, group)
        return take_rows(padded.reshape(-1, head_dim), slots).view(-1, num_heads * head_dim)

    def _head_slots(self, slots: Tensor, parts: int, num_heads: int, group: int) -> Tensor:
        """(S * parts * H,) where each vector of a packed row stands in the flattened padded form."""
        rows, positions = slots // self.length, slots % self.length
        span = group * self.length
        first = (rows // group) * (num_heads * span) + (rows % group) * self.length + positions
        heads = torch.arange(num_heads, device=slots.device) * span
        kinds = torch.arange(parts, device=slots.device) * (self.batch_size // group * num_heads * span)
        return (first[:, None, None] + kinds[None, :, None] + heads).flatten()


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
