"""Attention: self and cross, one to many key-value heads, rotary positions.

Letters: B batch, T query positions, N key positions, D width, H heads, K key-value heads, d head width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import BlockConfig
from opencoca.model.kernels.choice import CAUSAL, EVERYTHING, Form, Mask, choose_form
from opencoca.model.kernels.dense_attention import dense_attention
from opencoca.model.kernels.image_attention import SharedImages, attend_to_images
from opencoca.model.kernels.linear import Linear
from opencoca.model.kernels.packed_attention import packed_cross_attention, packed_self_attention
from opencoca.model.layers.layout import TextLayout


class NextWords(NamedTuple):
    """The next words of R texts, T of each, as one half of the decoder is to take them.

    positions (R x T,): of each word within its text. places: the entries where memory keeps them.
    visible: the entries that they see, (rows, N), or (rows, texts of a row x T, N); None = all.
    causal: whether a word does not see those of its text that come after it.
    """

    positions: Tensor
    places: slice | Tensor
    visible: Tensor | None = None
    causal: bool = False


class WordMemory(Protocol):
    """What self-attention keeps of the words of texts that come a few at a time."""

    def attend(self, queries: Tensor, keys_values: Tensor, words: NextWords) -> Tensor:
        """queries (R x T, H, d), keys and values (R x T, 2, K, d) of the next words -> what they mixed (R x T, H x d).

        The keys and values are kept.
        """
        ...


class ImageMemory(Protocol):
    """What cross-attention keeps of I images, for texts whose words come a few at a time."""

    def attend(self, queries: Tensor) -> Tensor:
        """queries (R x T, H, d) of the next words; R / I texts of an image -> what they mixed (R x T, H x d)."""
        ...


class Memories(Protocol):
    """The memories of all layers: of the two halves' self-attention, and of the images."""

    @property
    def unimodal(self) -> Sequence[WordMemory]: ...

    @property
    def multimodal(self) -> Sequence[WordMemory]: ...

    @property
    def images(self) -> Sequence[ImageMemory]: ...


class Attention(nn.Module):
    """Multi-head attention of queries x over a context, or over x itself.

    config gives heads and widths; context_width is the width of what keys and values are made from.
    Paper section 3.1; grouped key-value heads as in arXiv 2305.13245.
    """

    def __init__(self, config: BlockConfig, context_width: int | None = None, project_queries: bool = True):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        inner, bias = config.num_heads * config.head_dim, config.linear_bias
        self.q_proj = Linear(config.width, inner, bias=bias) if project_queries else nn.Identity()
        self.kv_proj = Linear(context_width or config.width, 2 * config.num_kv_heads * config.head_dim, bias=bias)
        self.out_proj = Linear(inner, config.width, bias=bias)
        self.rotary = config.rotary

    def hidden_maps(self) -> dict[nn.Module, int]:
        """Its matrices, and how many maps are stacked in each: keys and values are two."""
        return {self.q_proj: 1, self.kv_proj: 2, self.out_proj: 1}

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, N, C) -> keys, values (B, K, N, d). Of an image this is done once, however long the text."""
        keys_values = self.kv_proj(context).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        keys, values = keys_values.unbind(-3)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x (S, D) at these positions (S,) of their texts -> queries (S, H, d), keys and values (S, 2, K, d)."""
        queries = self.queries(x)
        keys_values = self.kv_proj(x).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        if self.rotary:
            angles = rotary_angles(positions, self.head_dim, queries.dtype).unsqueeze(1)
            queries = rotate(queries, angles)
            keys_values = torch.stack((rotate(keys_values[:, 0], angles), keys_values[:, 1]), dim=1)
        return queries, keys_values

    def queries(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., H, d)."""
        return self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))

    def self_attend(self, x: Tensor, layout: TextLayout, mask: Mask = CAUSAL) -> Tensor:
        """x (S, D) packed words -> (S, D): every word sees of its text what the mask lets it see.

        What the layout hides is seen by no word.
        """
        queries, keys_values = self.project(x, layout.positions)
        return self.out_proj(attend(queries, OwnWords(keys_values, layout), mask).flatten(1))

    def cross_attend(self, x: Tensor, images: "LookedAt") -> Tensor:
        """x (S, D) packed words -> (S, D): every word sees all of its image."""
        return self.out_proj(attend(self.queries(x), images).flatten(1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, T, D) over context (B, N, C), or over itself, nothing masked -> (B, T, D)."""
        keys, values = self.project_context(x if context is None else context)
        queries = self.queries(x).transpose(1, 2).expand(keys.shape[0], -1, -1, -1)
        return self.out_proj(attend(queries, Padded(keys, values)).transpose(1, 2).flatten(2))


class Padded(NamedTuple):
    """Memory of a padded batch: keys and values (B, K, N, d)."""

    keys: Tensor
    values: Tensor


class OwnWords(NamedTuple):
    """Memory of packed words, which see the words of their text: keys and values (S, 2, K, d)."""

    keys_values: Tensor
    layout: TextLayout


class SeenImages(NamedTuple):
    """Memory of packed words, which see their image: keys and values (I, K, N, d) of I images.

    Text row r belongs to image r // (B / I): texts of one image share its keys and values, uncopied.
    """

    keys: Tensor
    values: Tensor
    layout: TextLayout


class SeenTokens(NamedTuple):
    """As `SeenImages` with keys and values kv_proj(norm(tokens)), but none are made: the words are projected."""

    images: SharedImages
    kv_proj: nn.Linear
    norm: nn.Module
    num_kv_heads: int


LookedAt = SeenImages | SeenTokens


def attend(queries: Tensor, memory: Padded | OwnWords | LookedAt, mask: Mask = EVERYTHING) -> Tensor:
    """softmax(queries keys^T / sqrt(d)) values, by the way that takes least time.

    queries (B, H, T, d) over `Padded`, packed words (S, H, d) over any other memory -> of the same shape.
    """
    match memory:
        case Padded(keys, values):
            if choose_form(queries, keys.shape[2], mask) is Form.WRITTEN_OUT:
                return dense_attention(queries, keys, values)
            return _fused(queries, keys, values, mask)
        case OwnWords(keys_values, layout):
            if choose_form(queries, layout.length, mask, packed="causal") is Form.PACKED:
                return packed_self_attention(queries, keys_values, keys_values.shape[2], layout.buckets, layout.hidden)
            (padded,) = layout.pad_heads(queries.flatten(1), 1, queries.shape[2])
            keys, values = layout.pad_heads(keys_values.flatten(1), 2, queries.shape[2])
            mixed = _fused(padded, keys, values, layout.mask(mask))
            return layout.pack_heads(mixed).unflatten(1, queries.shape[1:])
        case SeenImages(keys, values, layout):
            group = layout.batch_size // keys.shape[0]
            if choose_form(queries, keys.shape[2], mask, packed="bidirectional") is Form.PACKED:
                return packed_cross_attention(queries, keys, values, layout.image_buckets(group))
            (padded,) = layout.pad_heads(queries.flatten(1), 1, queries.shape[2], group)
            return layout.pack_heads(_fused(padded, keys, values, mask), group).unflatten(1, queries.shape[1:])
        case SeenTokens():
            return attend_to_images(queries, *memory)


def _fused(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
    is_causal = mask.kind == "causal" and mask.visible is None and 1 < queries.shape[2] == keys.shape[2]
    seen = None if is_causal else mask.tensor(queries.shape[2], keys.shape[2], queries.device)
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, is_causal=is_causal, enable_gqa=queries.shape[1] > keys.shape[1]
    )


def rotary_angles(
    positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32, base: float = 10_000.0
) -> Tensor:
    """Angles (S, head_dim / 2) of positions (S,), in radians, in float32 at least. arXiv 2104.09864."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # Rounded to float32 whatever the type: the angles that weights learned with do not depend on it.
    frequencies = 1.0 / base**exponents
    wide = torch.promote_types(dtype, torch.float32)
    return positions.to(wide)[:, None] * frequencies.to(wide)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., T, d) with its two halves turned by angles (T, d / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
