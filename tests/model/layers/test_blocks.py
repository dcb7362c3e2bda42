"""Blocks against their formulas, and dropout's statistics."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opencoca.model.config import BlockConfig
from opencoca.model.kernels.dropout import Dropout
from opencoca.model.layers.blocks import Mlp, ParallelBlock, TransformerBlock, make_block, make_norm


def block_config(**changes) -> BlockConfig:
    fields = {"width": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "mlp_width": 12} | changes
    return BlockConfig(**fields)


def jitter(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double().eval().requires_grad_(False)


def test_mlp_formulas():
    x = torch.randn(3, 8, dtype=torch.float64)
    gelu = jitter(Mlp(block_config()))
    hidden = gelu.up_proj(x)
    activated = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(gelu(x), gelu.down_proj(activated))
    swiglu = jitter(Mlp(block_config(activation="swiglu")))
    hidden = swiglu.up_proj(x)
    value, gate = hidden[:, :12], hidden[:, 12:]
    torch.testing.assert_close(swiglu(x), swiglu.down_proj(value * gate / (1 + torch.exp(-gate))))
    quick = jitter(Mlp(block_config(activation="quick_gelu")))
    hidden = quick.up_proj(x)
    expected = quick.down_proj(hidden / (1 + torch.exp(-1.702 * hidden)))
    torch.testing.assert_close(quick(x), expected)
    with torch.no_grad():  # where the activation can be part of the product
        torch.testing.assert_close(gelu(x), gelu.down_proj(activated))
        torch.testing.assert_close(quick(x), expected)


def test_serial_and_parallel_blocks_follow_their_formulas():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    serial = jitter(make_block(block_config()))
    middle = x + serial.attn(serial.norm1(x))
    torch.testing.assert_close(serial(x), middle + serial.mlp(serial.norm2(middle)))
    scaled = jitter(make_block(block_config(layer_scale=0.3)))
    scaled.scale1.factor.normal_()
    scaled.scale2.factor.normal_()
    middle = x + scaled.scale1.factor * scaled.attn(scaled.norm1(x))
    torch.testing.assert_close(scaled(x), middle + scaled.scale2.factor * scaled.mlp(scaled.norm2(middle)))
    parallel = jitter(make_block(block_config(parallel=True)))
    assert isinstance(parallel, ParallelBlock)
    normed = parallel.norm1(x)
    torch.testing.assert_close(parallel(x), x + parallel.attn(normed) + parallel.mlp(normed))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_block_without_mlp_only_attends(parallel: bool):
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    block = jitter(make_block(block_config(parallel=parallel), has_mlp=False))
    torch.testing.assert_close(block(x), x + block.attn(block.norm1(x)))
    assert not any(isinstance(module, Mlp) for module in block.modules())


@pytest.mark.parametrize("norm_bias", [False, True])
@pytest.mark.parametrize("linear_bias", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_biases_are_where_they_are_asked_for(norm_bias: bool, linear_bias: bool, parallel: bool):
    block = make_block(block_config(norm_bias=norm_bias, linear_bias=linear_bias, parallel=parallel))
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.bias is not None) == norm_bias
        if isinstance(module, nn.Linear):
            assert (module.bias is not None) == linear_bias
    assert make_norm(block_config(), 5).weight.shape == (5,)


@pytest.mark.parametrize("has_mlp", [False, True])
def test_no_parameter_of_a_block_is_without_use(has_mlp: bool):
    for parallel in (False, True):
        block = make_block(block_config(parallel=parallel), has_mlp=has_mlp)
        block(torch.randn(2, 5, 8)).square().sum().backward()
        unused = [name for name, parameter in block.named_parameters() if parameter.grad is None]
        assert unused == []


def test_dropout_of_a_block_is_on_in_training_alone():
    block = TransformerBlock(block_config(dropout=0.5))
    x = torch.randn(2, 5, 8)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("probability", [0.004, 0.1, 0.25, 0.5, 0.9, 0.996])
def test_dropout_drops_the_documented_fraction_and_keeps_the_mean(probability: float):
    count = 400_001
    x = torch.ones(count)
    out = Dropout(probability).train()(x)
    fraction = round(256 * probability) / 256
    deviation = math.sqrt(fraction * (1 - fraction) / count)
    assert abs((out == 0).double().mean() - fraction) < 5 * deviation
    assert abs(fraction - probability) <= 1 / 512
    assert abs(out.double().mean() - 1) < 5 * deviation / (1 - fraction)
    # What stays is scaled by one number.
    assert out[out != 0].unique().tolist() == pytest.approx([1 / (1 - fraction)])


def test_dropout_drops_elements_independently():
    """Eight neighbours share one random number: their pattern must be as if they did not."""
    groups, probability = 60_000, 0.25
    dropped = (Dropout(probability).train()(torch.ones(groups * 8)) == 0).view(groups, 8).double()
    # Every place within the shared number has the same chance (its highest byte holds the sign) ...
    tolerance = 5 * math.sqrt(probability * (1 - probability) / groups)
    assert (dropped.mean(dim=0) - probability).abs().max() < tolerance
    # ... places are uncorrelated with one another, and with the number that follows ...
    correlation = torch.corrcoef(torch.cat((dropped[:-1], dropped[1:]), dim=1).T)
    assert (correlation - torch.eye(16)).abs().max() < 5 / math.sqrt(groups)
    # ... and how many of the eight fall is binomial: chi-square with 8 degrees of freedom, far beyond its 99.99%.
    observed = torch.bincount(dropped.sum(dim=1).long(), minlength=9).double()
    expected = torch.tensor(
        [groups * math.comb(8, k) * probability**k * (1 - probability) ** (8 - k) for k in range(9)]
    ).double()
    assert ((observed - expected) ** 2 / expected).sum() < 35


def test_dropout_is_the_identity_in_evaluation_and_at_zero():
    x = torch.randn(7)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_dropout_follows_the_seed():
    dropout, x = Dropout(0.5).train(), torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.floats(0, 0.9999999))
def test_dropout_takes_every_shape_and_probability(shape: list[int], probability: float):
    x = torch.randn(shape, dtype=torch.float64).transpose(0, -1)
    out = Dropout(probability).train()(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.isfinite().all()


def test_dropout_passes_gradients_where_it_passes_values():
    x = torch.rand(1000) + 1
    x.requires_grad_()
    out = Dropout(0.5).train()(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out / x).detach())


@pytest.mark.parametrize("probability", [-0.1, 1.0, 1.5])
def test_impossible_dropout(probability: float):
    with pytest.raises(ValueError, match=str(probability)):
        Dropout(probability)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_added_to_a_residual_is_dropout_and_a_sum(dtype: torch.dtype):
    dropout = Dropout(0.25).train()
    x = torch.randn(40, 12, dtype=torch.float64).to(dtype).requires_grad_()
    residual = torch.randn(40, 12, dtype=torch.float64).to(dtype).requires_grad_()
    torch.manual_seed(3)
    added = dropout(x, residual)
    torch.manual_seed(3)
    dropped = dropout(x)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(added, residual + dropped, rtol=tolerance, atol=tolerance)
    direction = torch.randn(40, 12).to(dtype)
    (got_residual, got_x) = torch.autograd.grad(added, (residual, x), direction)
    (want_x,) = torch.autograd.grad(dropped, x, direction)
    torch.testing.assert_close(got_residual, direction)
    torch.testing.assert_close(got_x, want_x)


def test_dropout_added_in_evaluation_is_a_sum():
    x, residual = torch.randn(2, 3, 4)
    assert torch.equal(Dropout(0.5).eval()(x, residual), residual + x)
    assert torch.equal(Dropout(0.0).train()(x, residual), residual + x)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias")])
def test_an_mlp_that_keeps_less_has_the_same_gradients(activation: Any, bias: bool, frozen: tuple[str, ...]) -> None:
    mlp = Mlp(BlockConfig(6, 2, 2, 3, 10, activation=activation, linear_bias=bias)).double()
    for name in frozen:
        parameter = getattr(mlp.down_proj, name)
        if parameter is not None:
            parameter.requires_grad_(False)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(parameter for parameter in mlp.parameters() if parameter.requires_grad))
    ours, expected = mlp(x), mlp.down_proj(mlp.activation(mlp.up_proj(x)))
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, inputs, direction)
    for own, other in zip(grads, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(own, other)


def test_an_mlp_under_autocast_gives_gradients_in_the_weights_type() -> None:
    mlp, x = Mlp(BlockConfig(32, 2, 2, 16, 64)), torch.randn(7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = mlp(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert mlp.down_proj.weight.grad is not None
    got = mlp.down_proj.weight.grad.clone()
    mlp.zero_grad()
    mlp(x).square().sum().backward()
    assert got.dtype == torch.float32
    assert float((got - mlp.down_proj.weight.grad).norm() / got.norm()) < 0.02
