"""Attentional poolers: from image features to image tokens and one image vector, and how two of them are arranged.

Paper, section 3.2. Letters: B batch, N image features, C their width, Q queries, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from opencoca.model.config import BlockConfig, CoCaConfig, HeadConfig
from opencoca.model.kernels.choice import projects_words
from opencoca.model.kernels.dropout import Dropout
from opencoca.model.kernels.image_attention import FoldedImages
from opencoca.model.layers.attention import Attention, Padded
from opencoca.model.layers.blocks import make_norm


class PooledImage(NamedTuple):
    """tokens (B, Q, D) for the decoder to look at; vector (B, D) for the image embedding; None if not asked for."""

    tokens: Tensor | None
    vector: Tensor | None


class AttentionalPooler(nn.Module):
    """One attention layer whose queries are learned: features (B, N, C) -> (B, Q, D).

    norm_queries, norm_output: whether the queries and the pooled vectors are normalised; the features always are.
    """

    def __init__(
        self,
        config: BlockConfig,
        context_width: int,
        num_queries: int,
        project_queries: bool,
        norm_queries: bool = False,
        norm_output: bool = True,
    ):
        super().__init__()
        query_width = config.width if project_queries else config.num_heads * config.head_dim
        self.query = nn.Parameter(torch.empty(num_queries, query_width))
        self.norm_query = make_norm(config, query_width) if norm_queries else nn.Identity()
        self.norm_context = make_norm(config, context_width)
        self.attn = Attention(config, context_width, project_queries)
        self.norm = make_norm(config) if norm_output else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        context = self.norm_context(features)
        query = self.norm_query(self.query).to(context.dtype).unsqueeze(0)
        return self.norm(self.attn(query, Padded(*self.attn.project_context(context))))


class OneQueryPooler(AttentionalPooler):
    """A pooler of one query, which is projected instead of the features: (B, N, C) -> (B, D).

    The same function (see `FoldedImages`) for a fraction of the products: of N positions none is projected.
    """

    def __init__(self, config: BlockConfig, context_width: int):
        super().__init__(config, context_width, num_queries=1, project_queries=False)

    def forward(self, features: Tensor) -> Tensor:
        attn = self.attn
        heads = attn.num_heads, attn.head_dim
        if not projects_words(1, features.shape[1], *heads, attn.kv_proj):
            return super().forward(features).squeeze(1)
        context = self.norm_context(features)
        images = FoldedImages.of(context, attn.kv_proj, nn.Identity(), attn.num_heads, attn.num_kv_heads)
        queries = self.query.to(context.dtype).expand(len(context), -1).unflatten(-1, heads)
        return self.norm(attn.out_proj(images.attend(queries).flatten(-2)))


class TaskHead(nn.Module):
    """What a task adds: a pooler of one query over image features (B, N, C), then a linear map -> (B, num_outputs)."""

    def __init__(self, config: HeadConfig, context_width: int):
        super().__init__()
        self.pooler = OneQueryPooler(config.block(context_width), context_width)
        self.dropout = Dropout(config.dropout)
        self.proj = nn.Linear(context_width, config.num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(self.dropout(self.pooler(features)))


class FeatureProjection(nn.Module):
    """No pooling: every image feature becomes an image token, (B, N, C) -> (B, N, D)."""

    def __init__(self, context_width: int, width: int):
        super().__init__()
        self.norm_context = nn.LayerNorm(context_width)
        self.proj = nn.Linear(context_width, width) if context_width != width else nn.Identity()
        self.norm = nn.LayerNorm(width) if context_width != width else nn.Identity()

    def hidden_maps(self) -> dict[nn.Module, int]:
        """Its matrix, which is one map."""
        return {self.proj: 1}

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.proj(self.norm_context(features)))


class TwoPoolers(nn.Module):
    """A captioning pooler and a contrastive pooler of one query, which reads its tokens (cascade) or the features."""

    def __init__(self, config: CoCaConfig, context_width: int):
        super().__init__()
        self.cascade = config.pooler.arrangement == "cascade"
        if config.pooler.num_queries:
            self.caption_pooler = _make_pooler(config, context_width, config.pooler.num_queries)
        else:
            self.caption_pooler = FeatureProjection(context_width, config.text.width)
        self.contrastive_pooler = _make_pooler(config, config.text.width if self.cascade else context_width, 1)

    def forward(self, features: Tensor, captioning: bool, contrastive: bool) -> PooledImage:
        tokens = self.caption_pooler(features) if captioning or self.cascade else None
        if not contrastive:
            return PooledImage(tokens, None)
        vector = self.contrastive_pooler(tokens if self.cascade else features).squeeze(1)
        return PooledImage(tokens if captioning else None, vector)


class SharedPooler(nn.Module):
    """One pooler for both: its first query is the image vector, the others are the image tokens."""

    def __init__(self, config: CoCaConfig, context_width: int):
        super().__init__()
        self.pooler = _make_pooler(config, context_width, config.pooler.num_queries)

    def forward(self, features: Tensor, captioning: bool, contrastive: bool) -> PooledImage:
        return _split_first(self.pooler(features), captioning, contrastive)


class ClassToken(nn.Module):
    """No pooling: the first feature, a ViT's class token, is the image vector, the others are the image tokens."""

    def forward(self, features: Tensor, captioning: bool, contrastive: bool) -> PooledImage:
        return _split_first(features, captioning, contrastive)


def _split_first(vectors: Tensor, captioning: bool, contrastive: bool) -> PooledImage:
    return PooledImage(vectors[:, 1:] if captioning else None, vectors[:, 0] if contrastive else None)


def _make_pooler(config: CoCaConfig, context_width: int, num_queries: int) -> AttentionalPooler:
    return AttentionalPooler(
        config.pooler_block(),
        context_width,
        num_queries,
        config.pooler.project_queries,
        config.compat.pooler_norm_queries,
        config.compat.pooler_norm_output,
    )


class ImagePooling(nn.Module):
    """features (B, N, C) -> PooledImage, by the arrangement that the configuration names."""

    def __init__(self, config: CoCaConfig, context_width: int):
        super().__init__()
        self.dropout = Dropout(config.pooler.dropout)
        if config.pooler.arrangement == "shared":
            self.poolers = SharedPooler(config, context_width)
        elif config.pooler.arrangement == "class_token":
            self.poolers = ClassToken()
        else:
            self.poolers = TwoPoolers(config, context_width)

    def unused(self, captioning: bool, contrastive: bool) -> list[nn.Module]:
        """What is not computed for these."""
        poolers = self.poolers
        if not isinstance(poolers, TwoPoolers):
            return []
        unused: list[nn.Module] = [] if captioning or poolers.cascade else [poolers.caption_pooler]
        return unused if contrastive else [*unused, poolers.contrastive_pooler]

    def forward(self, features: Tensor, captioning: bool = True, contrastive: bool = True) -> PooledImage:
        """captioning: tokens are wanted; contrastive: the vector is; what neither needs is not computed."""
        return self.poolers(self.dropout(features), captioning, contrastive)
