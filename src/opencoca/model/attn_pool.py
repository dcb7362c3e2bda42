"""Attentional poolers: from image features to image tokens and one image vector, and how two of them are arranged.

Paper, section 3.2. Letters: B batch, N image features, C their width, Q queries, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from opencoca.model.attention import Attention
from opencoca.model.blocks import Dropout
from opencoca.model.config import BlockConfig, CoCaConfig


class PooledImage(NamedTuple):
    """tokens (B, Q, D) for the decoder to look at; vector (B, D) for the image embedding; None if not asked for."""

    tokens: Tensor | None
    vector: Tensor | None


class AttentionalPooler(nn.Module):
    """One attention layer whose queries are learned: features (B, N, C) -> (B, Q, D)."""

    def __init__(self, config: BlockConfig, context_width: int, num_queries: int, project_queries: bool):
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_queries, config.width))
        self.norm_context = nn.LayerNorm(context_width)
        self.attn = Attention(config, context_width, project_queries)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, features: Tensor) -> Tensor:
        context = self.norm_context(features)
        query = self.query.to(context.dtype).unsqueeze(0)
        return self.norm(self.attn(query, context))


class FeatureProjection(nn.Module):
    """No pooling: every image feature becomes an image token, (B, N, C) -> (B, N, D)."""

    def __init__(self, context_width: int, width: int):
        super().__init__()
        self.norm_context = nn.LayerNorm(context_width)
        self.proj = nn.Linear(context_width, width) if context_width != width else nn.Identity()
        self.norm = nn.LayerNorm(width) if context_width != width else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.proj(self.norm_context(features)))


class TwoPoolers(nn.Module):
    """A captioning pooler and a contrastive pooler of one query, which reads its tokens (cascade) or the features."""

    def __init__(self, config: BlockConfig, context_width: int, num_queries: int, project_queries: bool, cascade: bool):
        super().__init__()
        if num_queries:
            self.caption_pooler = AttentionalPooler(config, context_width, num_queries, project_queries)
        else:
            self.caption_pooler = FeatureProjection(context_width, config.width)
        contrastive_width = config.width if cascade else context_width
        self.contrastive_pooler = AttentionalPooler(config, contrastive_width, 1, project_queries)
        self.cascade = cascade

    def forward(self, features: Tensor, captioning: bool, contrastive: bool) -> PooledImage:
        tokens = self.caption_pooler(features) if captioning or self.cascade else None
        if not contrastive:
            return PooledImage(tokens, None)
        vector = self.contrastive_pooler(tokens if self.cascade else features).squeeze(1)
        return PooledImage(tokens if captioning else None, vector)


class SharedPooler(nn.Module):
    """One pooler for both: its first query is the image vector, the others are the image tokens."""

    def __init__(self, config: BlockConfig, context_width: int, num_queries: int, project_queries: bool):
        super().__init__()
        self.pooler = AttentionalPooler(config, context_width, num_queries, project_queries)

    def forward(self, features: Tensor, captioning: bool, contrastive: bool) -> PooledImage:
        pooled = self.pooler(features)
        return PooledImage(pooled[:, 1:] if captioning else None, pooled[:, 0] if contrastive else None)


class ImagePooling(nn.Module):
    """features (B, N, C) -> PooledImage, by the arrangement that the configuration names."""

    def __init__(self, config: CoCaConfig, context_width: int):
        super().__init__()
        pooler, width = config.pooler, config.text.width
        heads = pooler.num_heads
        block = BlockConfig(width, heads, heads, width // heads, mlp_width=0)
        self.dropout = Dropout(pooler.dropout)
        if pooler.arrangement == "shared":
            self.poolers = SharedPooler(block, context_width, pooler.num_queries, pooler.project_queries)
        else:
            cascade = pooler.arrangement == "cascade"
            self.poolers = TwoPoolers(block, context_width, pooler.num_queries, pooler.project_queries, cascade)

    def forward(self, features: Tensor, captioning: bool = True, contrastive: bool = True) -> PooledImage:
        """captioning: tokens are wanted; contrastive: the vector is; what neither needs is not computed."""
        return self.poolers(self.dropout(features), captioning, contrastive)
