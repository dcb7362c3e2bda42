"""The transformer's parts: MLP, dropout, and the two kinds of block.

Letters: B batch, S packed positions, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opencoca.model.config import BlockConfig
from opencoca.model.kernels.choice import CAUSAL, Mask
from opencoca.model.kernels.dropout import drop_and_add, serves
from opencoca.model.kernels.image_attention import SharedImages
from opencoca.model.kernels.linear import Linear, activate_and_project
from opencoca.model.layers.attention import Attention, ImageMemory, LookedAt, NextWords, SeenTokens, WordMemory
from opencoca.model.layers.layout import TextLayout


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


class Dropout(nn.Module):
    """Zeroes elements with a probability and scales the others, so that the mean stays.

    On a CPU the probability is rounded to a 256th: see `opencoca.model.kernels.dropout`.
    """

    def __init__(self, probability: float):
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"dropout {probability} must be at least 0 and less than 1")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        return drop_and_add(None, x, self.probability) if serves(x) else F.dropout(x, self.probability)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + dropout(x); in one pass on a CPU."""
        if not self.training or self.probability == 0:
            return residual + x
        if serves(x) and residual.dtype == x.dtype:
            return drop_and_add(residual, x, self.probability)
        return residual + self(x)

    def extra_repr(self) -> str:
        return f"{self.probability}"


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)) if it has an MLP.

    context_width: builds cross-attention over a context of this width instead of self-attention.
    norm_context and layer_scale of the configuration add a norm of that context, and learned factors to what is added.
    recompute: in training, what is inside is not kept, but computed again, with the same dropout, for the gradient.
    """

    recompute = False
    forward_methods = ("self_attend",)  # what is called besides `forward`, by those who do not attend to a context

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

    def add_mlp(self, x: Tensor, normed: Tensor, mixed: Tensor) -> Tensor:
        x = self.dropout.add(x, self.scale1(mixed))
        if self.mlp is None or self.norm2 is None:
            return x
        return self.dropout.add(x, self.scale2(self.mlp(self.norm2(x))))

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, N, C) of cross-attention -> its keys and values (B, K, N, d)."""
        return self.attn.project_context(self.norm_context(context))

    def look_at(self, images: SharedImages) -> SeenTokens:
        """The images as this block looks at them without keys and values."""
        return SeenTokens(images, self.attn.kv_proj, self.norm_context, self.attn.num_kv_heads)

    def context_modules(self) -> list[nn.Module]:
        """What `project_context` consists of."""
        norm = self.norm_context
        return [self.attn.kv_proj] if isinstance(norm, nn.Identity) else [norm, self.attn.kv_proj]

    def compile_parts(self) -> None:
        """Compiles what acts on single positions after attention, for any number of them."""
        self.add_mlp = torch.compile(self.add_mlp, dynamic=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D), everything sees everything (image encoders)."""
        return self._run(self._attend, x)

    def self_attend(self, x: Tensor, layout: TextLayout, mask: Mask = CAUSAL) -> Tensor:
        """x (S, D) packed words, which see of their text what the mask lets them see."""
        return self._run(self._self_attend, x, layout, mask)

    def cross_attend(self, x: Tensor, images: LookedAt) -> Tensor:
        """x (S, D) packed words, which see all of their image."""
        return self._run(self._cross_attend, x, images)

    def step(self, x: Tensor, memory: WordMemory, words: NextWords) -> Tensor:
        """x (R x T, D): the next words of texts, which see the words in memory; without gradient."""
        normed = self.norm1(x)
        queries, keys_values = self.attn.project(normed, words.positions)
        return self.add_mlp(x, normed, self.attn.out_proj(memory.attend(queries, keys_values, words)))

    def step_across(self, x: Tensor, images: ImageMemory) -> Tensor:
        """x (R x T, D): the next words of texts, which see their images; without gradient."""
        normed = self.norm1(x)
        return self.add_mlp(x, normed, self.attn.out_proj(images.attend(self.attn.queries(normed))))

    def _run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return function(*arguments)

    def _attend(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        return self.add_mlp(x, normed, self.attn(normed))

    def _self_attend(self, x: Tensor, layout: TextLayout, mask: Mask) -> Tensor:
        normed = self.norm1(x)
        return self.add_mlp(x, normed, self.attn.self_attend(normed, layout, mask))

    def _cross_attend(self, x: Tensor, images: LookedAt) -> Tensor:
        normed = self.norm1(x)
        return self.add_mlp(x, normed, self.attn.cross_attend(normed, images))


class ParallelBlock(TransformerBlock):
    """Attention and MLP both read one norm and are added at once (PaLM, arXiv 2204.02311)."""

    def __init__(self, config: BlockConfig, context_width: int | None = None, has_mlp: bool = True):
        super().__init__(config, context_width, has_mlp)
        self.norm2 = None

    def add_mlp(self, x: Tensor, normed: Tensor, mixed: Tensor) -> Tensor:
        if self.mlp is not None:
            mixed = mixed + self.mlp(normed)
        return self.dropout.add(x, mixed)


def _make_scale(config: BlockConfig) -> nn.Module:
    return nn.Identity() if config.layer_scale is None else LayerScale(config.width, config.layer_scale)


def make_block(config: BlockConfig, context_width: int | None = None, has_mlp: bool = True) -> TransformerBlock:
    """The block that the configuration asks for."""
    return (ParallelBlock if config.parallel else TransformerBlock)(config, context_width, has_mlp)
