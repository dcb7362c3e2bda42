"""Rearranged weights and products of oneDNN: the same products, for as long as the weights are those they were."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from opencoca.model.kernels import linear as linear_module
from opencoca.model.kernels.linear import Linear, pack_weights


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
        packed = pack_weights(linear)
        after = linear(x)
    if packed:
        assert calls == [num_rows]
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


@needs_mkldnn
def test_only_few_rows_without_gradient_in_the_weights_type(calls):
    linear = Linear(8, 5)
    with torch.no_grad():
        packed = pack_weights(linear)
        linear(torch.randn(257, 8))
        linear(torch.randn(2, 3, 8))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(torch.randn(2, 8)).dtype == torch.bfloat16
    assert linear(torch.randn(2, 8)).requires_grad
    assert packed
    assert calls == []


@needs_mkldnn
def test_changed_weights_are_noticed(calls):
    linear, x = Linear(8, 5), torch.randn(3, 8)
    with torch.no_grad():
        packed = pack_weights(linear)
        linear.weight.mul_(2)
        expected = x @ linear.weight.T + linear.bias
        torch.testing.assert_close(linear(x), expected)
        assert packed
        assert calls == []
        packed = pack_weights(linear)
        torch.testing.assert_close(linear(x), expected)
        assert calls == [3]
        linear.weight = nn.Parameter(torch.zeros(5, 8))
        torch.testing.assert_close(linear(x), linear.bias.expand(3, -1))
        linear.double()
        assert linear(x.double()).dtype == torch.float64


@pytest.fixture
def on_another_makers_processor(monkeypatch) -> None:
    monkeypatch.setattr(linear_module, "_leaves_mkl", lambda: True)
    monkeypatch.setattr(linear_module, "_FEWEST_PRODUCTS", 300 * 70 * 130)


@needs_mkldnn
@pytest.mark.usefixtures("on_another_makers_processor")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300, 70), (3, 100, 70), (2, 3, 50, 70)], ids=str)
def test_large_products_by_onednn(calls, bias, shape):
    linear, x = Linear(70, 130, bias=bias), torch.randn(*shape)
    expected = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    with torch.no_grad():
        torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert calls == [shape[0]]


@needs_mkldnn
@pytest.mark.usefixtures("on_another_makers_processor")
def test_what_is_left_to_the_other_library(calls):
    linear, x = Linear(70, 130), torch.randn(300, 70)
    assert linear(x).requires_grad
    with torch.no_grad():
        linear(x[:299])
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            linear(x)
        assert counter.get_total_flops() == 2 * 300 * 70 * 130
        linear.double()(x.double())
        linear.bfloat16()(x.bfloat16())
    assert calls == []
    with torch.no_grad():
        exported = torch.export.export(linear.float(), (x,))
    assert "mkldnn" not in str(exported.graph)
    assert calls == []


@needs_mkldnn
@pytest.mark.parametrize(
    ("capability", "vendor", "leaves"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", "GenuineIntel", False),
        ("DEFAULT", "", False),
    ],
)
def test_which_processors_leave_mkl(monkeypatch, capability, vendor, leaves):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(linear_module, "cpu_vendor", lambda: vendor)
    assert linear_module._leaves_mkl.__wrapped__() == leaves


def test_packing_is_no_part_of_the_module():
    linear = Linear(8, 5)
    packed = pack_weights(nn.Sequential(linear, nn.LayerNorm(5)))
    assert set(linear.state_dict()) == {"weight", "bias"}
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert other._packed is None
        assert torch.equal(other.weight, linear.weight)
    assert len(packed) == torch.backends.mkldnn.is_available()
    with torch.inference_mode():
        loaded = Linear(8, 5)
        packed = pack_weights(loaded)
        x = torch.randn(2, 8)
        torch.testing.assert_close(loaded(x), x @ loaded.weight.T + loaded.bias)


@needs_mkldnn
def test_packing_lasts_while_it_is_held(calls):
    linear, x = Linear(8, 5), torch.randn(2, 8)
    with torch.no_grad():
        packed = pack_weights(linear)
        assert pack_weights(linear)[0] is packed[0]
        linear(x)
        assert calls == [2]
        del packed
        linear(x)
    assert calls == [2]


@needs_mkldnn
def test_no_other_weight_takes_the_place_of_a_packed_one():
    linear = Linear(64, 64)
    place = linear.weight.data_ptr()
    packed = pack_weights(linear)
    for _ in range(20):
        linear.weight = None  # pyright: ignore
        linear.weight = nn.Parameter(torch.empty(64, 64))
        assert linear.weight.data_ptr() != place
    assert packed


def test_types_without_a_kernel_stay_as_they_are():
    assert pack_weights(Linear(8, 5).double()) == []
