"""Attention for training on a CPU, written out: two products and a softmax, with a gradient that copies nothing twice.

Against the fused kernel 1.2 to 2.4 times as fast in float32 on an AMD EPYC (results/attention_forms.md).
Letters: B batch, T query positions, N key positions, H heads, K key-value heads, d head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class DenseAttention(torch.autograd.Function):
    """queries (B, H, T, d), keys and values (B, K, N, d), all of one type -> (B, H, T, d), nothing masked."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        head_dim = queries.shape[3]
        rows = keys.shape[0] * keys.shape[1]
        scaled = torch.mul(queries, head_dim**-0.5).contiguous().view(rows, -1, head_dim)
        keys, values = keys.contiguous(), values.contiguous()
        mixed = torch.empty_like(scaled)
        weights = mix(scaled, keys.view(rows, -1, head_dim), values.view(rows, -1, head_dim), mixed, None)
        ctx.save_for_backward(scaled, keys, values, weights)
        return mixed.view(queries.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled, keys, values, weights = ctx.saved_tensors
        (grad_mixed,) = grad_outputs
        grads = [torch.empty_like(tensor) for tensor in (scaled, keys, values)]
        rows, _, head_dim = scaled.shape
        tensors = (scaled, keys, values, grad_mixed.contiguous(), *grads)
        q, k, v, grad_out, *parts = (tensor.view(rows, -1, head_dim) for tensor in tensors)
        mix_backward(q, k, v, weights, grad_out, parts)
        return grads[0].mul_(head_dim**-0.5).view(grad_mixed.shape), grads[1], grads[2]


def mix(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    """Writes softmax(queries keys^T + bias) values into out; all (rows, positions, d). Returns the weights.

    bias (R or 1, T, T): of each R-th part of the rows, for each T of its queries.
    """
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if bias is not None:
        heads = scores.view(bias.shape[0], -1, bias.shape[1], bias.shape[2])
        heads += bias.unsqueeze(1)
    # Of low precision, the kernel computes in float32 and rounds once: what casting before and after it would give.
    weights = scores.softmax(dim=-1)
    torch.bmm(weights, values, out=out)
    return weights


def mix_backward(
    queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor, grad_out: Tensor, grads: Sequence[Tensor]
) -> None:
    """Writes the gradients of `mix` by queries, keys and values into grads."""
    torch.bmm(weights.transpose(1, 2), grad_out, out=grads[2])
    grad_weights = torch.bmm(grad_out, values.transpose(1, 2))
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    torch.bmm(grad_scores, keys, out=grads[0])
    torch.bmm(grad_scores.transpose(1, 2), queries, out=grads[1])
