"""The three parts of a CoCa as graphs of fixed structure, which an exporter can trace and any runtime can run.

The network computes packed words, whose number depends on the data. Here the same modules and weights compute padded
texts, and a step of decoding takes its caches as tensors and returns longer ones; nothing branches on a shape.
Letters: I images, B texts (as many as images where both meet), P cached positions, T new ones, Q image tokens, D width,
E embed_dim, V vocabulary, L layers, K key-value heads, d head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.coca import CoCa
from opencoca.model.config import Compat
from opencoca.model.layers.attention import CachedWords, NextWords
from opencoca.model.text_decoder import UnimodalDecoder

_CLS_ID = -1


class ImageGraph(nn.Module):
    """Encodes pixels (I, 3, height, width): image tokens (I, Q, D), embedding (I, E) and cache (L, 2, I, K, Q, d).

    The cache holds the keys and values of the image for every layer of the multimodal decoder.
    """

    def __init__(self, model: CoCa):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = self.model.encode_image(pixels)
        keys_values = self.model.project_image(output.tokens)
        return output.tokens, output.embed, torch.stack([torch.stack(pair) for pair in keys_values])


class TextGraph(nn.Module):
    """Embeds texts: token_ids (B, T), token_mask (B, T), True = real and never behind padding -> text_embed (B, E)."""

    def __init__(self, model: CoCa):
        super().__init__()
        self.decoder, self.proj, self.compat = model.unimodal_decoder, model.text_proj, model.config.compat
        self.linear_branch = model.linear_branch

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        decoder, compat = self.decoder, self.compat
        lengths = token_mask.sum(dim=1, keepdim=True)
        # Where [CLS] looks at a padding position behind the words, that position comes first, if there is room.
        extra = int(compat.text_hide_next)
        padding = compat.text_hidden_id or 0
        cls_at = lengths + extra * (lengths < decoder.context_length)
        ids = F.pad(token_ids, (0, 1 + extra), value=padding)
        columns = torch.arange(ids.shape[1], device=ids.device)
        if extra:
            ids = torch.where(columns == lengths, padding, ids)
        is_cls = columns == cls_at
        x = torch.where(is_cls.unsqueeze(-1), decoder.cls_vector(), _embed(decoder, ids, columns))
        positions = columns.expand(ids.shape)
        if compat.text_cls_position == "after_padding":
            positions = torch.where(is_cls, token_ids.shape[1] + extra, positions)
        mask = columns[:, None] >= columns
        visible = _visible(compat, torch.where(is_cls, _CLS_ID, ids))
        if visible is not None:
            mask = mask & visible[:, None, None, :]
        x = decoder.step(x, [_Cache(mask)] * len(decoder.blocks), NextWords(positions, slice(0)))
        vector = decoder.norm((x * is_cls.unsqueeze(-1)).sum(dim=1))
        embed = F.normalize(self.proj(vector), dim=-1)
        if self.linear_branch is None:
            return embed
        return self.linear_branch.join(embed, self.linear_branch.text_vectors(token_ids, token_mask))


class DecoderGraph(nn.Module):
    """Decodes: all words so far and the caches of the first P of them -> logits (B, V) after the last word, new caches.

    token_ids (B, P + T), without padding; unimodal_cache and multimodal_cache (L, 2, B, K, P, d), keys before values,
    where P may be 0; image_cache (L, 2, B, K, Q, d) as `ImageGraph` makes it, an image for each text.
    """

    def __init__(self, model: CoCa):
        super().__init__()
        self.unimodal, self.multimodal, self.lm_head = model.unimodal_decoder, model.multimodal_decoder, model.lm_head
        self.compat = model.config.compat

    def forward(
        self, token_ids: Tensor, unimodal_cache: Tensor, multimodal_cache: Tensor, image_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        columns = torch.arange(token_ids.shape[1], device=token_ids.device)
        past = unimodal_cache.shape[4]
        ids, new = token_ids[:, past:], columns[past:]
        words = NextWords(new.expand(ids.shape), slice(past, None))
        causal = new[:, None] >= columns
        visible = _visible(self.compat, token_ids)
        mask = causal if visible is None else causal & visible[:, None, None, :]
        x = _embed(self.unimodal, ids, new)
        own = [_Cache(mask, cache) for cache in unimodal_cache.unbind(0)]
        x = self.unimodal.step(x, own, words)
        later = [_Cache(causal, cache) for cache in multimodal_cache.unbind(0)]
        images = [_Image(*image) for image in image_cache.unbind(0)]
        x = self.multimodal(x, [CachedWords(cache, words) for cache in later], images)
        unimodal_cache = torch.stack([cache.keys_values for cache in own])  # pyright: ignore[reportArgumentType]
        multimodal_cache = torch.stack([cache.keys_values for cache in later])  # pyright: ignore[reportArgumentType]
        return self.lm_head(x[:, -1]), unimodal_cache, multimodal_cache


def empty_cache(model: CoCa, batch_size: int, half: str, past: int = 0) -> Tensor:
    """Makes the cache of the ``unimodal`` or ``multimodal`` half: zeros (L, 2, B, K, past, d)."""
    text = model.config.text
    block = model.config.unimodal_block() if half == "unimodal" else model.config.multimodal_block()
    depth = text.unimodal_depth if half == "unimodal" else text.multimodal_depth
    return torch.zeros(depth, 2, batch_size, block.num_kv_heads, past, block.head_dim)


def _embed(decoder: UnimodalDecoder, ids: Tensor, columns: Tensor) -> Tensor:
    """Embeds ids (B, T) that stand at these columns (T,) of their texts: (B, T, D)."""
    x = decoder.token_embed(ids)
    if decoder.pos_embed is None:
        return x
    # Columns behind the last position hold padding, or [CLS], which brings its own.
    return x + decoder.pos_embed[columns.clamp(max=decoder.context_length - 1)]


def _visible(compat: Compat, ids: Tensor) -> Tensor | None:
    """Tells which of the ids (B, N) attention may see; None = all. See `Compat.text_hidden_id`."""
    if compat.text_hidden_id is None:
        return None
    visible = torch.ne(ids, compat.text_hidden_id)
    first = torch.ones_like(visible[:, :1])
    return torch.cat((first, visible[:, :-1] if compat.text_hide_next else visible[:, 1:]), dim=1)


class _Cache:
    """Keys and values (2, B, K, P, d) of the words before, to which `attend` adds the next ones."""

    def __init__(self, mask: Tensor, keys_values: Tensor | None = None):
        self.mask, self.keys_values = mask, keys_values

    def attend(self, queries: Tensor, keys_values: Tensor, words: NextWords) -> Tensor:
        """queries (B, T, H, d), keys and values (B, T, 2, K, d) -> what they mixed (B, T, H, d)."""
        new = keys_values.permute(2, 0, 3, 1, 4)
        if self.keys_values is not None:
            new = self.keys_values = torch.cat((self.keys_values, new), dim=3)
        return _attend(queries, new[0], new[1], self.mask)


class _Image(NamedTuple):
    """Keys and values (B, K, Q, d) of an image for each text."""

    keys: Tensor
    values: Tensor

    def attend(self, queries: Tensor) -> Tensor:
        return _attend(queries, self.keys, self.values, None)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attends to keys and values (B, K, N, d): queries (B, T, H, d) -> (B, T, H, d).

    mask: (T, N) or (B, 1, T, N), True = sees.
    """
    num_kv_heads, head_dim = keys.shape[1], queries.shape[3]
    queries = queries.transpose(1, 2).unflatten(1, (num_kv_heads, -1)) * head_dim**-0.5
    scores = queries @ keys.unsqueeze(2).transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~(mask if mask.ndim == 2 else mask.unsqueeze(2)), float("-inf"))
    return (scores.softmax(dim=-1) @ values.unsqueeze(2)).flatten(1, 2).transpose(1, 2)
