"""Attention: self and cross, one to many key-value heads, rotary positions.

Letters: B batch, T query positions, N key positions, D width, H heads, K key-value heads, d head width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import BlockConfig
from opencoca.model.kernels.choice import EVERYTHING, Mask, trains_on_cpu
from opencoca.model.kernels.dense_attention import DenseAttention
from opencoca.model.kernels.image_attention import SharedImages, attend_to_images
from opencoca.model.kernels.linear import Linear
from opencoca.model.kernels.packed_attention import PackedSelfAttention, packed_cross_attention
from opencoca.model.layers.layout import TextLayout

# In float32 the fused kernel is as fast from this many query-key pairs a head on, and keeps no weights.
_MOST_PAIRS = 1 << 14


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
        """queries (R x T, H, d), keys and values (R x T, 2, K, d) of the next words -> what they mixed (R x T, H, d).

        The keys and values are kept.
        """
        ...


class CachedWords(NamedTuple):
    """The next words of texts, and what one layer keeps of the words before them."""

    cache: WordMemory
    words: NextWords


class ImageMemory(Protocol):
    """What cross-attention keeps of I images, for texts whose words come a few at a time."""

    def attend(self, queries: Tensor) -> Tensor:
        """queries (R x T, H, d) of the next words; R / I texts of an image -> what they mixed (R x T, H, d)."""
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

    def forward(self, x: Tensor, memory: "Memory | None" = None, mask: Mask = EVERYTHING) -> Tensor:
        """x (B, T, D), or packed (S, D) -> the same shape: what x mixes of what it sees in the memory.

        memory: of self-attention, where the packed words x stand, or what is kept of the words before them; None = the
        rows of x see themselves. Of cross-attention, what is looked at.
        """
        queries = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        if memory is not None and not isinstance(memory, TextLayout | CachedWords):
            return self.out_proj(attend(queries, memory, mask).flatten(-2))
        keys_values = self.kv_proj(x).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        words = memory.words if isinstance(memory, CachedWords) else memory
        if self.rotary and words is not None:
            angles = rotary_angles(words.positions, self.head_dim, queries.dtype).unsqueeze(-2)
            keys, values = keys_values.unbind(-3)
            queries, keys_values = rotate(queries, angles), torch.stack((rotate(keys, angles), values), dim=-3)
        if isinstance(memory, CachedWords):
            mixed = memory.cache.attend(queries, keys_values, memory.words)
        else:
            mixed = attend(queries, OwnWords(keys_values, memory), mask)
        return self.out_proj(mixed.flatten(-2))


class Padded(NamedTuple):
    """Memory of a padded batch: keys and values (B, K, N, d)."""

    keys: Tensor
    values: Tensor


class OwnWords(NamedTuple):
    """Memory of words that see the words of their text: keys and values (S, 2, K, d), packed as the layout says.

    layout None: they are not packed, but (B, T, 2, K, d).
    """

    keys_values: Tensor
    layout: TextLayout | None


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


LookedAt = Padded | SeenImages | SeenTokens | ImageMemory
"""What cross-attention looks at."""

Memory = TextLayout | CachedWords | LookedAt
"""What an attention layer sees besides its input."""


def attend(queries: Tensor, memory: LookedAt | OwnWords, mask: Mask = EVERYTHING) -> Tensor:
    """softmax(queries keys^T / sqrt(d)) values, by the way that takes least time: of the shape of queries.

    queries: (B, T, H, d) over `Padded` (or one row for all B) and over what is not packed, else packed words (S, H, d).
    results/attention_forms.md has what the other ways gain over the fused kernel: on a CPU, in training alone.
    """
    sees_all = mask.kind == "bidirectional" and mask.visible is None
    match memory:
        case Padded(keys, values):
            queries = queries.transpose(1, 2).expand(keys.shape[0], -1, -1, -1)
            is_short = queries.element_size() < 4 or queries.shape[2] * keys.shape[2] <= _MOST_PAIRS
            if sees_all and is_short and trains_on_cpu(queries):
                # Learned queries stay in float32 under autocast; what they look at does not.
                return DenseAttention.apply(queries.to(values.dtype), keys, values).transpose(1, 2)
            is_causal = mask.kind == "causal" and mask.visible is None and 1 < queries.shape[2] == keys.shape[2]
            seen = None if is_causal else mask.tensor(queries.shape[2], keys.shape[2], queries.device)
            is_grouped = queries.shape[1] > keys.shape[1]
            mixed = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=seen, is_causal=is_causal, enable_gqa=is_grouped
            )
            return mixed.transpose(1, 2)
        case OwnWords(keys_values, layout) if layout is not None:
            if mask.kind == "causal" and mask.visible is None and trains_on_cpu(queries):
                return PackedSelfAttention.apply(queries, keys_values, layout.buckets, layout.hidden)
            (padded,) = layout.pad_heads(queries.flatten(1), 1, queries.shape[2])
            keys, values = layout.pad_heads(keys_values.flatten(1), 2, queries.shape[2])
            mixed = attend(padded.transpose(1, 2), Padded(keys, values), layout.mask(mask))
            return layout.pack_heads(mixed.transpose(1, 2)).unflatten(1, queries.shape[1:])
        case OwnWords(keys_values, _):
            keys, values = keys_values.transpose(1, 3).unbind(2)
            return attend(queries, Padded(keys, values), mask)
        case SeenImages(keys, values, layout):
            group = layout.batch_size // keys.shape[0]
            if sees_all and trains_on_cpu(queries):
                return packed_cross_attention(queries, keys, values, layout.image_buckets(group))
            (padded,) = layout.pad_heads(queries.flatten(1), 1, queries.shape[2], group)
            mixed = attend(padded.transpose(1, 2), Padded(keys, values), mask)
            return layout.pack_heads(mixed.transpose(1, 2), group).unflatten(1, queries.shape[1:])
        case SeenTokens():
            return attend_to_images(queries, *memory)
        case _:
            return memory.attend(queries)


def rotary_angles(
    positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32, base: float = 10_000.0
) -> Tensor:
    """Angles (..., head_dim / 2) of positions (...), in radians, in float32 at least. arXiv 2104.09864."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # Rounded to float32 whatever the type: the angles that weights learned with do not depend on it.
    frequencies = 1.0 / base**exponents
    wide = torch.promote_types(dtype, torch.float32)
    return positions.to(wide)[..., None] * frequencies.to(wide)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., T, d) with its two halves turned by angles (T, d / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
