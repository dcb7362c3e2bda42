"""Attention written out against PyTorch's own in float64, values and gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from opencoca.model.kernels.dense_attention import DenseAttention


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("length", "num_keys"), [(1, 1), (5, 9), (9, 5)])
def test_equals_the_fused_kernel(heads: int, kv_heads: int, length: int, num_keys: int) -> None:
    queries = torch.randn(3, heads, length, 8, dtype=torch.float64, requires_grad=True)
    keys, values = torch.randn(2, 3, kv_heads, num_keys, 8, dtype=torch.float64).requires_grad_().unbind()
    direction = torch.randn_like(queries)
    found = []
    for function in (
        DenseAttention.apply(queries, keys, values),
        scaled_dot_product_attention(queries, keys, values, enable_gqa=True),
    ):
        found.append((function, *torch.autograd.grad(function, (queries, keys, values), direction)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_takes_transposed_and_expanded_inputs() -> None:
    queries = torch.randn(1, 6, 2, 8, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(3, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    expanded = queries.transpose(1, 2).expand(3, -1, -1, -1)
    ours, expected = DenseAttention.apply(expanded, keys, keys), scaled_dot_product_attention(expanded, keys, keys)
    torch.testing.assert_close(ours, expected)
    pairs = (torch.autograd.grad(output.square().sum(), (queries, keys)) for output in (ours, expected))
    for own, other in zip(*pairs, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_float64(dtype: torch.dtype) -> None:
    inputs = [torch.randn(2, 3, 50, 16).to(dtype).requires_grad_() for _ in range(3)]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    ours, exact = DenseAttention.apply(*inputs), DenseAttention.apply(*exact_inputs)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=0.02, atol=0.02)
    direction = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, inputs, direction)
    for own, other in zip(grads, torch.autograd.grad(exact, exact_inputs, direction.double()), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=0.05, atol=0.05)
