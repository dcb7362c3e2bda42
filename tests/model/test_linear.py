"""Rearranged weights: the same products, for as long as the weights are those that were rearranged."""

import copy

import pytest
import torch
from torch import nn

from opencoca.model.linear import Linear, _packed, pack_weights


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The rows of every product with a rearranged weight."""
    rows: list[int] = []
    kernel = torch.ops.mkldnn._linear_pointwise

    def counted(x, *args):
        rows.append(x.shape[0])
        return kernel(x, *args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return rows


needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")


@needs_mkldnn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 7, 48, 256])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_same_products(calls, bias, num_rows, dtype, tolerance):
    linear = Linear(70, 130, bias=bias).to(dtype)
    x = torch.randn(num_rows, 70).to(dtype)
    with torch.no_grad():
        before = linear(x)
        pack_weights(linear)
        after = linear(x)
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert calls == [num_rows]
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


@needs_mkldnn
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_gelu_in_the_same_pass(calls, dtype, tolerance):
    linear = Linear(70, 130).to(dtype)
    x = torch.randn(9, 70).to(dtype)
    with torch.no_grad():
        before = linear.with_gelu(x)
        torch.testing.assert_close(before, torch.nn.functional.gelu(linear(x)), rtol=0, atol=0)
        pack_weights(linear)
        after = linear.with_gelu(x)
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert calls == [9]
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


@needs_mkldnn
def test_only_few_rows_without_gradient_in_the_weights_type(calls):
    linear = Linear(8, 5)
    with torch.no_grad():
        pack_weights(linear)
        linear(torch.randn(257, 8))
        linear(torch.randn(2, 3, 8))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(torch.randn(2, 8)).dtype == torch.bfloat16
    assert linear(torch.randn(2, 8)).requires_grad
    assert calls == []


@needs_mkldnn
def test_changed_weights_are_noticed(calls):
    linear, x = Linear(8, 5), torch.randn(3, 8)
    with torch.no_grad():
        pack_weights(linear)
        linear.weight.mul_(2)
        expected = x @ linear.weight.T + linear.bias
        torch.testing.assert_close(linear(x), expected)
        assert calls == []
        pack_weights(linear)
        torch.testing.assert_close(linear(x), expected)
        assert calls == [3]
        linear.weight = nn.Parameter(torch.zeros(5, 8))
        torch.testing.assert_close(linear(x), linear.bias.expand(3, -1))
        linear.double()
        assert linear(x.double()).dtype == torch.float64


def test_packing_is_no_part_of_the_module():
    linear = Linear(8, 5)
    pack_weights(nn.Sequential(linear, nn.LayerNorm(5)))
    assert set(linear.state_dict()) == {"weight", "bias"}
    other = copy.deepcopy(linear)
    assert other not in _packed
    with torch.inference_mode():
        loaded = Linear(8, 5)
        pack_weights(loaded)
        x = torch.randn(2, 8)
        torch.testing.assert_close(loaded(x), x @ loaded.weight.T + loaded.bias)
    count = len(_packed)
    del linear, loaded
    assert len(_packed) < count or count == 0


def test_types_without_a_kernel_stay_as_they_are():
    linear = Linear(8, 5).double()
    pack_weights(linear)
    assert linear not in _packed
