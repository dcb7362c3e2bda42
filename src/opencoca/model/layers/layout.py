"""Where the real words of a padded batch stand, so that only they are computed.

Layers that act on one position at a time (norms, projections, MLPs) run on the packed words (S, D);
attention, which needs rows, pads and packs again. With real captions this saves about half of the text's work.
Letters: B batch, T text positions, S real positions of the whole batch, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from opencoca.model.kernels.choice import Mask
from opencoca.model.kernels.packed_attention import Buckets, PutRows, TakeRows, running_index


@dataclass(frozen=True)
class TextLayout:
    """The real positions of a batch of texts, row by row.

    batch_size, length: B and T of the padded form; rows are padded at their end.
    lengths: (B,) how many real positions each text has; positions: (S,) of each within its text, from 0.
    slots: (S,) where each stands in the flattened (B * T) padded form, None if all are real.
    hidden: (S,) which of them attention does not see, never the first of a text; None = it sees all.
    """

    batch_size: int
    length: int
    lengths: Tensor
    positions: Tensor
    slots: Tensor | None
    hidden: Tensor | None = None
    _image_buckets: dict[int, Buckets] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(lengths: Tensor) -> "TextLayout":
        """Layout of texts of these lengths (B,)."""
        batch_size = len(lengths)
        length = int(lengths.max()) if batch_size else 0
        positions = running_index(lengths)
        if len(positions) == batch_size * length:
            return TextLayout(batch_size, length, lengths, positions, None)
        rows = torch.arange(batch_size, device=lengths.device).repeat_interleave(lengths, output_size=len(positions))
        return TextLayout(batch_size, length, lengths, positions, rows * length + positions)

    @cached_property
    def buckets(self) -> Buckets:
        """The texts with their like, for attention on a CPU."""
        return Buckets.of(self.lengths)

    def image_buckets(self, group: int) -> Buckets:
        """Rows of ``group`` consecutive texts, all texts of one image, one after another without gaps."""
        if group not in self._image_buckets:
            self._image_buckets[group] = Buckets.of(self.lengths.view(-1, group).sum(dim=1), rounding=None)
        return self._image_buckets[group]

    def mask(self, mask: Mask) -> Mask:
        """The mask over padded texts: what this layout hides is hidden, and so is padding where it could be seen."""
        if self.hidden is None and (self.slots is None or mask.kind == "causal"):
            return mask
        visible = self.pad(torch.ones_like(self.positions, dtype=torch.bool) if self.hidden is None else ~self.hidden)
        return mask._replace(visible=visible if mask.visible is None else visible[:, None] & mask.visible)

    def pad(self, packed: Tensor) -> Tensor:
        """(S, ...) -> (B, T, ...), zeros where there is no word."""
        if self.slots is not None:
            packed = PutRows.apply(packed, self.slots, self.batch_size * self.length)
        return packed.reshape(self.batch_size, self.length, *packed.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (S, ...)."""
        flat = padded.reshape(self.batch_size * self.length, *padded.shape[2:])
        return flat if self.slots is None else TakeRows.apply(flat, self.slots)

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
        return PutRows.apply(packed.reshape(-1, head_dim), slots, math.prod(shape[:4])).view(shape)

    def pack_heads(self, padded: Tensor, group: int = 1) -> Tensor:
        """(B / group, H, group * T, d) -> (S, H * d): the inverse of `pad_heads` for one part."""
        num_heads, head_dim = padded.shape[1], padded.shape[3]
        if self.slots is None:
            return padded.transpose(1, 2).reshape(self.batch_size * self.length, num_heads * head_dim)
        slots = self._head_slots(self.slots, 1, num_heads, group)
        return TakeRows.apply(padded.reshape(-1, head_dim), slots).view(-1, num_heads * head_dim)

    def _head_slots(self, slots: Tensor, parts: int, num_heads: int, group: int) -> Tensor:
        """(S * parts * H,) where each vector of a packed row stands in the flattened padded form."""
        rows, positions = slots // self.length, slots % self.length
        span = group * self.length
        first = (rows // group) * (num_heads * span) + (rows % group) * self.length + positions
        heads = torch.arange(num_heads, device=slots.device) * span
        kinds = torch.arange(parts, device=slots.device) * (self.batch_size // group * num_heads * span)
        return (first[:, None, None] + kinds[None, :, None] + heads).flatten()


class PackedTexts(NamedTuple):
    """Texts as a decoder's blocks take them, packed.

    ids: of what is embedded as words, standing at rows of the layout. cls_rows (B,): the rows of [CLS], if it is there.
    words: the layout of the words alone, which stand at word_rows of the whole.
    """

    ids: Tensor
    rows: Tensor
    layout: TextLayout
    cls_rows: Tensor
    words: TextLayout
    word_rows: Tensor


TextPacker = Callable[[Tensor, Tensor, bool], PackedTexts]


def pack_texts(token_ids: Tensor, mask: Tensor, with_cls: bool) -> PackedTexts:
    """token_ids, mask (B, T), True = real -> the words of each text, one after another, and then its [CLS].

    Padding may stand anywhere: it is left out.
    """
    ids, lengths = token_ids[mask], mask.sum(dim=1)
    words = TextLayout.of(lengths)
    rows = torch.arange(len(ids), device=ids.device)
    if not with_cls:
        return PackedTexts(ids, rows, words, rows[:0], words, rows)
    # Every text before a word has brought a [CLS].
    rows = rows + torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths, output_size=len(ids))
    return PackedTexts(ids, rows, TextLayout.of(lengths + 1), (lengths + 1).cumsum(dim=0) - 1, words, rows)
