"""Attention: self and cross, one to many key-value heads, rotary positions.

Letters: B batch, T query positions, N key positions, D width, H heads, K key-value heads, d head width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import BlockConfig
from opencoca.model.kernels.dense_attention import dense_attention, is_best_written_out
from opencoca.model.kernels.image_attention import SharedImages, attend_to_images
from opencoca.model.kernels.linear import Linear
from opencoca.model.kernels.packed_attention import packed_cross_attention, packed_self_attention, split_keys_values
from opencoca.model.layers.layout import TextLayout

CrossKeysValues = tuple[Tensor, Tensor]


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
        if trains_on_cpu(keys_values):
            return split_keys_values(keys_values)
        keys, values = keys_values.unbind(-3)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x (S, D) at these positions (S,) of their texts -> queries (S, H, d), keys and values (S, 2, K, d)."""
        queries = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        keys_values = self.kv_proj(x).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        if self.rotary:
            angles = rotary_angles(positions, self.head_dim, queries.dtype).unsqueeze(1)
            queries = rotate(queries, angles)
            keys_values = torch.stack((rotate(keys_values[:, 0], angles), keys_values[:, 1]), dim=1)
        return queries, keys_values

    def self_attend(self, x: Tensor, layout: TextLayout) -> Tensor:
        """x (S, D) packed words -> (S, D): every word sees itself and the words before it.

        What the layout hides is seen by no word.
        """
        queries, keys_values = self.project(x, layout.positions)
        if trains_on_cpu(queries):
            mixed = packed_self_attention(queries, keys_values, self.num_kv_heads, layout.buckets, layout.hidden)
            return self.out_proj(mixed.flatten(1))
        (queries,) = layout.pad_heads(queries.flatten(1), 1, self.head_dim)
        keys, values = layout.pad_heads(keys_values.flatten(1), 2, self.head_dim)
        return self.out_proj(layout.pack_heads(attend(queries, keys, values, causal=True, visible=layout.visible)))

    def cross_attend(self, x: Tensor, keys: Tensor, values: Tensor, layout: TextLayout) -> Tensor:
        """x (S, D) packed words, keys and values (I, K, N, d) of I images -> (S, D).

        Text row r belongs to image r // (B / I): texts of one image share its keys and values, uncopied.
        """
        num_images = keys.shape[0]
        assert layout.batch_size % num_images == 0, "texts cannot be shared out evenly among the images"
        group = layout.batch_size // num_images
        queries = self.q_proj(x)
        if trains_on_cpu(queries):
            queries = queries.unflatten(-1, (self.num_heads, self.head_dim))
            mixed = packed_cross_attention(queries, keys, values, layout.image_buckets(group))
            return self.out_proj(mixed.flatten(1))
        (queries,) = layout.pad_heads(queries, 1, self.head_dim, group)
        return self.out_proj(layout.pack_heads(attend(queries, keys, values, causal=False), group))

    def attend_to_images(self, x: Tensor, images: SharedImages, norm: nn.Module) -> Tensor:
        """As `cross_attend` over ``project_context(norm(tokens))``, but without keys and values: (S, D) -> (S, D)."""
        queries = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        return self.out_proj(attend_to_images(queries, images, self.kv_proj, norm, self.num_kv_heads).flatten(1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, T, D) over context (B, N, C), or over itself, nothing masked -> (B, T, D)."""
        keys, values = self.project_context(x if context is None else context)
        queries = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        mixed = attend(queries.expand(keys.shape[0], -1, -1, -1), keys, values, causal=False)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def attend(queries: Tensor, keys: Tensor, values: Tensor, causal: bool, visible: Tensor | None = None) -> Tensor:
    """softmax(queries keys^T / sqrt(d)) values.

    queries (B, H, T, d), keys and values (B, K, N, d) -> (B, H, T, d). Causal: the last query sees all keys, the one
    before it all but the last, and so on. visible (B, N) or (B, T, N): keys that are False are not seen.
    """
    if not causal and visible is None and trains_on_cpu(queries) and is_best_written_out(queries, keys):
        return dense_attention(queries, keys, values)
    is_causal = causal and visible is None and 1 < queries.shape[2] == keys.shape[2]
    mask = None if is_causal else attention_mask(queries, keys, causal, visible)
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=queries.shape[1] > keys.shape[1]
    )


def trains_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.is_grad_enabled() and x.requires_grad and x.numel() > 0


def attention_mask(queries: Tensor, keys: Tensor, causal: bool, visible: Tensor | None) -> Tensor | None:
    """What `attend` lets its queries see, True = may see: (T, N), (B, 1, 1, N) or (B, 1, T, N); None = everything."""
    mask = causal_mask(queries.shape[2], keys.shape[2], queries.device) if causal and queries.shape[2] > 1 else None
    if visible is None:
        return mask
    visible = visible[:, None] if visible.dim() == 3 else visible[:, None, None]
    return visible if mask is None else visible & mask


def causal_mask(length: int, num_keys: int, device: torch.device) -> Tensor:
    """(length, num_keys), True = may see; the last query sees every key."""
    return torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(num_keys - length)


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
