"""Attention: self and cross, one to many key-value heads, rotary positions, key-value caches.

Letters: B batch, T query positions, N key positions, D width, H heads, K key-value heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import BlockConfig
from opencoca.model.layout import TextLayout


class KeyValueCache:
    """Keys and values of one self-attention layer, of the positions that have been decoded so far.

    keys, values: (B, K, capacity, d), allocated once; ``length`` positions of them are filled.
    """

    def __init__(self, batch_size: int, config: BlockConfig, capacity: int, like: Tensor):
        shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys, values (B, K, T, d) behind those there; returns views of all: (B, K, length, d)."""
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[2], "the cache is full"
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps these rows (R,), in this order: drops finished texts, reorders beams."""
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)


class Attention(nn.Module):
    """Multi-head attention of queries x over a context, or over x itself.

    config gives heads and widths; context_width is the width of what keys and values are made from.
    Paper section 3.1; grouped key-value heads as in arXiv 2305.13245.
    """

    def __init__(self, config: BlockConfig, context_width: int | None = None, project_queries: bool = True):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        inner, bias = config.num_heads * config.head_dim, config.linear_bias
        self.q_proj = nn.Linear(config.width, inner, bias=bias) if project_queries else nn.Identity()
        self.kv_proj = nn.Linear(context_width or config.width, 2 * config.num_kv_heads * config.head_dim, bias=bias)
        self.out_proj = nn.Linear(inner, config.width, bias=bias)
        self.rotary = config.rotary

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, N, C) -> keys, values (B, K, N, d). Of an image this is done once, however long the text."""
        keys, values = self.kv_proj(context).unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(-3)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def self_attend(self, x: Tensor, layout: TextLayout, cache: KeyValueCache | None = None) -> Tensor:
        """x (S, D) packed words -> (S, D): every word sees itself and the words before it, cached ones included."""
        (queries,) = layout.pad_heads(self.q_proj(x), 1, self.head_dim)
        keys, values = layout.pad_heads(self.kv_proj(x), 2, self.head_dim)
        start = cache.length if cache is not None else 0
        if self.rotary:
            angles = rotary_angles(start, queries.shape[2], self.head_dim, queries.device)
            queries, keys = rotate(queries, angles), rotate(keys, angles)
        if cache is not None:
            keys, values = cache.append(keys, values)
        return self.out_proj(layout.pack_heads(attend(queries, keys, values, causal=True)))

    def cross_attend(self, x: Tensor, keys: Tensor, values: Tensor, layout: TextLayout) -> Tensor:
        """x (S, D) packed words, keys and values (I, K, N, d) of I images -> (S, D).

        Text row r belongs to image r // (B / I): texts of one image share its keys and values, uncopied.
        """
        num_images = keys.shape[0]
        assert layout.batch_size % num_images == 0, "texts cannot be shared out evenly among the images"
        group = layout.batch_size // num_images
        (queries,) = layout.pad_heads(self.q_proj(x), 1, self.head_dim, group)
        return self.out_proj(layout.pack_heads(attend(queries, keys, values, causal=False), group))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, T, D) over context (B, N, C), or over itself, nothing masked -> (B, T, D)."""
        keys, values = self.project_context(x if context is None else context)
        queries = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        mixed = attend(queries.expand(keys.shape[0], -1, -1, -1), keys, values, causal=False)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def attend(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """softmax(queries keys^T / sqrt(d)) values.

    queries (B, H, T, d), keys and values (B, K, N, d) -> (B, H, T, d). Causal: the last query sees all keys, the one
    before it all but the last, and so on.
    """
    groups = queries.shape[1] // keys.shape[1]
    if queries.device.type == "cpu" and torch.is_grad_enabled() and queries.requires_grad:
        return _attend_with_gradient_on_cpu(queries, keys, values, causal, groups)
    mask, is_causal = None, False
    if causal and queries.shape[2] > 1:
        is_causal = queries.shape[2] == keys.shape[2]
        mask = None if is_causal else causal_mask(queries.shape[2], keys.shape[2], queries.device)
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=groups > 1
    )


def _attend_with_gradient_on_cpu(queries: Tensor, keys: Tensor, values: Tensor, causal: bool, groups: int) -> Tensor:
    # Written out because the CPU kernel's backward is several times slower at text lengths: results/step_cost.md.
    batch_size, num_heads, length, head_dim = queries.shape
    queries = queries * head_dim**-0.5
    if groups > 1:
        queries = queries.reshape(batch_size, keys.shape[1], groups * length, head_dim)
    scores = torch.matmul(queries, keys.transpose(-2, -1)).view(batch_size, num_heads, length, keys.shape[2])
    if causal:
        scores = scores.masked_fill(~causal_mask(length, keys.shape[2], queries.device), float("-inf"))
    weights = scores.softmax(dim=-1).to(values.dtype)
    if groups > 1:
        weights = weights.reshape(batch_size, keys.shape[1], groups * length, keys.shape[2])
    return torch.matmul(weights, values).view(batch_size, num_heads, length, head_dim)


def causal_mask(length: int, num_keys: int, device: torch.device) -> Tensor:
    """(length, num_keys), True = may see; the last query sees every key."""
    return torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(num_keys - length)


def rotary_angles(start: int, length: int, head_dim: int, device: torch.device, base: float = 10_000.0) -> Tensor:
    """Angles (length, head_dim / 2) of positions start .. start + length - 1, in radians. arXiv 2104.09864."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    return torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequencies


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., T, d) with its two halves turned by angles (T, d / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
