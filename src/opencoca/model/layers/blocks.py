"""The transformer's parts: the MLP and the two kinds of block.

Letters: B batch, S packed positions, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opencoca.model.config import BlockConfig
from opencoca.model.kernels.choice import EVERYTHING, Mask
from opencoca.model.kernels.dropout import Dropout
from opencoca.model.kernels.linear import Linear, activate_and_project
from opencoca.model.layers.attention import Attention, Memory


def make_norm(config: BlockConfig, width: int | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(width or config.width, bias=config.norm_bias)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def swiglu(x: Tensor) -> Tensor:
    """Half of the channels, gated by the other half (arXiv 2002.05202)."""
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value


_ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu, "swiglu": swiglu}


class Mlp(nn.Module):
    """(..., D) -> (..., D): up, activation, down."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.activation = _ACTIVATIONS[config.activation]
        self.up_proj = Linear(config.width, config.mlp_width * (2 if self.gated else 1), bias=config.linear_bias)
        self.down_proj = Linear(config.mlp_width, config.width, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        return activate_and_project(self.up_proj(x), self.activation, self.down_proj)

    def hidden_maps(self) -> dict[nn.Module, int]:
        """Its matrices, and how many maps are stacked in each."""
        return {self.up_proj: 2 if self.gated else 1, self.down_proj: 1}


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor (arXiv 2103.17239): (..., D) -> (..., D)."""

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.initial = initial
        self.factor = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)) if it has an MLP.

    context_width: builds cross-attention over a context of this width instead of self-attention.
    norm_context and layer_scale of the configuration add a norm of that context, and learned factors to what is added.
    recompute: in training, what is inside is not kept, but computed again, with the same dropout, for the gradient.
    """

    recompute = False

    def __init__(self, config: BlockConfig, context_width: int | None = None, has_mlp: bool = True):
        super().__init__()
        self.has_context = context_width is not None
        self.norm1 = make_norm(config)
        has_norm = config.norm_context and self.has_context
        self.norm_context = make_norm(config, context_width) if has_norm else nn.Identity()
        self.attn = Attention(config, context_width)
        self.scale1 = _make_scale(config)
        self.norm2 = make_norm(config) if has_mlp else None
        self.mlp = Mlp(config) if has_mlp else None
        self.scale2 = _make_scale(config) if has_mlp else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Memory | None = None, mask: Mask = EVERYTHING) -> Tensor:
        """x (B, N, D), or packed words (S, D), which see of the memory what the mask lets them see: see `Attention`."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._compute, x, memory, mask, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return self._compute(x, memory, mask)

    def _compute(self, x: Tensor, memory: Memory | None, mask: Mask) -> Tensor:
        normed = self.norm1(x)
        return self.add_mlp(x, normed, self.attn(normed, memory, mask))

    def add_mlp(self, x: Tensor, normed: Tensor, mixed: Tensor) -> Tensor:
        """x, what attention mixed of normed, and the MLP of both."""
        x = self.dropout(self.scale1(mixed), x)
        if self.mlp is None or self.norm2 is None:
            return x
        return self.dropout(self.scale2(self.mlp(self.norm2(x))), x)

    def context_modules(self) -> list[nn.Module]:
        """What prepares a context: its norm, and the projection to keys and values."""
        norm = self.norm_context
        return [self.attn.kv_proj] if isinstance(norm, nn.Identity) else [norm, self.attn.kv_proj]

    def compile_parts(self) -> None:
        """Compiles what acts on single positions after attention, for any number of them."""
        self.add_mlp = torch.compile(self.add_mlp, dynamic=True)


class ParallelBlock(TransformerBlock):
    """Attention and MLP both read one norm and are added at once (PaLM, arXiv 2204.02311)."""

    def __init__(self, config: BlockConfig, context_width: int | None = None, has_mlp: bool = True):
        super().__init__(config, context_width, has_mlp)
        self.norm2 = None

    def add_mlp(self, x: Tensor, normed: Tensor, mixed: Tensor) -> Tensor:
        if self.mlp is not None:
            mixed = mixed + self.mlp(normed)
        return self.dropout(mixed, x)


def _make_scale(config: BlockConfig) -> nn.Module:
    return nn.Identity() if config.layer_scale is None else LayerScale(config.width, config.layer_scale)


def make_block(config: BlockConfig, context_width: int | None = None, has_mlp: bool = True) -> TransformerBlock:
    """The block that the configuration asks for."""
    return (ParallelBlock if config.parallel else TransformerBlock)(config, context_width, has_mlp)
