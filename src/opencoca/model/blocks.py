"""The transformer's parts: MLP, dropout, and the two kinds of block.

Letters: B batch, S packed positions, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.attention import Attention, KeyValueCache
from opencoca.model.config import BlockConfig
from opencoca.model.layout import TextLayout

CrossKeysValues = tuple[Tensor, Tensor]


def make_norm(config: BlockConfig, width: int | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(width or config.width, bias=config.norm_bias)


class Mlp(nn.Module):
    """(..., D) -> (..., D): up, activation, down; SwiGLU (arXiv 2002.05202) gates with a second projection."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up_proj = nn.Linear(config.width, config.mlp_width * (2 if self.gated else 1), bias=config.linear_bias)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up_proj(x)
        if self.gated:
            value, gate = hidden.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * value)
        return self.down_proj(F.gelu(hidden))


class Dropout(nn.Module):
    """Zeroes elements with a probability and scales the others, so that the mean stays.

    On a CPU the probability is rounded to a 256th: one random 64-bit number then serves eight elements, which makes
    it about ten times as fast as drawing a float for each (results/step_cost.md).
    """

    def __init__(self, probability: float):
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"dropout {probability} must be at least 0 and less than 1")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.probability)
        dropped = min(round(256 * self.probability), 255)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = (words.view(torch.uint8)[: x.numel()] >= dropped).view(x.shape)
        # As factors of x's own type: multiplying by booleans is many times slower.
        return x * keep.to(x.dtype).mul_(256 / (256 - dropped))

    def extra_repr(self) -> str:
        return f"{self.probability}"


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)) if it has an MLP.

    context_width: builds cross-attention over a context of this width instead of self-attention.
    """

    def __init__(self, config: BlockConfig, context_width: int | None = None, has_mlp: bool = True):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config, context_width)
        self.norm2 = make_norm(config) if has_mlp else None
        self.mlp = Mlp(config) if has_mlp else None
        self.dropout = Dropout(config.dropout)

    def add_mlp(self, x: Tensor, normed: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self.dropout(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D), everything sees everything (image encoders)."""
        normed = self.norm1(x)
        return self.add_mlp(x, normed, self.attn(normed))

    def self_attend(self, x: Tensor, layout: TextLayout, cache: KeyValueCache | None = None) -> Tensor:
        """x (S, D) packed words, causal."""
        normed = self.norm1(x)
        return self.add_mlp(x, normed, self.attn.self_attend(normed, layout, cache))

    def cross_attend(self, x: Tensor, keys_values: CrossKeysValues, layout: TextLayout) -> Tensor:
        """x (S, D) packed words over the keys and values of their images."""
        normed = self.norm1(x)
        return self.add_mlp(x, normed, self.attn.cross_attend(normed, *keys_values, layout))


class ParallelBlock(TransformerBlock):
    """Attention and MLP both read one norm and are added at once (PaLM, arXiv 2204.02311)."""

    def __init__(self, config: BlockConfig, context_width: int | None = None, has_mlp: bool = True):
        super().__init__(config, context_width, has_mlp)
        self.norm2 = None

    def add_mlp(self, x: Tensor, normed: Tensor, mixed: Tensor) -> Tensor:
        if self.mlp is not None:
            mixed = mixed + self.mlp(normed)
        return x + self.dropout(mixed)


def make_block(config: BlockConfig, context_width: int | None = None, has_mlp: bool = True) -> TransformerBlock:
    """The block that the configuration asks for."""
    return (ParallelBlock if config.parallel else TransformerBlock)(config, context_width, has_mlp)
