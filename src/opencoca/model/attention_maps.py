"""Attention weights over the image, recomputed from the modules' projections.

Letters: I images, B texts, S packed words, T text positions, L multimodal layers, H heads, K key-value heads, Q image
tokens, N image features, D width, d head width.
"""

import torch
from torch import Tensor

from opencoca.model.coca import CoCa
from opencoca.model.kernels.choice import CAUSAL
from opencoca.model.layers.attention import Attention, SeenImages
from opencoca.model.layers.layout import TextLayout
from opencoca.model.layers.poolers import AttentionalPooler, SharedPooler
from opencoca.model.text_decoder import Words


@torch.inference_mode()
def cross_attention(model: CoCa, token_ids: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's attention over the image tokens: token_ids (B, T), image_tokens (I, Q, D) -> (L, B, H, T, Q).

    Also the hidden states (B, T, D) that the pass ends in. No mask: all tokens are real.
    """
    words = model.word_states(token_ids)
    decoder = model.multimodal_decoder
    x, maps = words.states, []
    for layer, (keys, values) in zip(decoder.layers, decoder.project_image(image_tokens), strict=True):
        x = layer.self_block(x, words.layout, CAUSAL)  # pyright: ignore
        block = layer.cross_block
        maps.append(text_attention_weights(block.attn, block.norm1(x), keys, words.layout))  # pyright: ignore
        x = block(x, SeenImages(keys, values, words.layout))  # pyright: ignore
    return torch.stack(maps), Words(decoder.norm(x), words.layout).padded()


def text_attention_weights(attn: Attention, x: Tensor, keys: Tensor, layout: TextLayout) -> Tensor:
    """The weights with which cross-attention mixes values: x (S, D), keys (I, K, Q, d) -> (B, H, T, Q)."""
    group = layout.batch_size // keys.shape[0]
    queries = layout.pad(attn.q_proj(x)).unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)
    return attention_weights(queries, keys.repeat_interleave(group, dim=0))


def pooler_attention(model: CoCa, features: Tensor) -> Tensor | None:
    """features (I, N, C) -> (I, H, Q, N): what each image token is made of; None if the tokens are the features."""
    poolers = model.image_pooling.poolers
    shared = isinstance(poolers, SharedPooler)
    pooler = poolers.pooler if shared else getattr(poolers, "caption_pooler", None)
    if not isinstance(pooler, AttentionalPooler):
        return None
    context = pooler.norm_context(features)
    keys, _ = pooler.attn.project_context(context)
    queries = pooler.attn.q_proj(pooler.norm_query(pooler.query).to(context.dtype).unsqueeze(0))
    queries = queries.unflatten(-1, (pooler.attn.num_heads, pooler.attn.head_dim)).transpose(1, 2)
    weights = attention_weights(queries.expand(features.shape[0], -1, -1, -1), keys)
    return weights[:, :, 1:] if shared else weights  # the shared pooler's first query is the image vector


def attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """softmax(queries keys^T / sqrt(d)): queries (B, H, T, d), keys (B, K, N, d) -> (B, H, T, N), float32 or wider."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(-2, -1))
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
