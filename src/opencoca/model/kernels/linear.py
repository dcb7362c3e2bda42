"""Linear maps on a CPU without gradient, by the faster of PyTorch's two libraries for matrix products.

Weights in the order in which oneDNN's kernel reads them: a product of few rows costs little more than rearranging the
weight for the kernel, which it does anew in every call. Decoding calls each weight once a word, so it is worth keeping
it rearranged: on two cores, steps of 8 rows take about 0.7 and steps of 48 rows about 0.87 of the time.

oneDNN for large products in float32 where MKL, which PyTorch takes, runs on another maker's processor and leaves its
512-bit units unused: 430 GFLOP/s instead of 187 on two cores of an AMD EPYC.

Letters: R rows, D width in, F width out.
"""

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Beyond it rearranging is a small part of the product.
_MOST_ROWS = 256
_DTYPES = (torch.float32, torch.bfloat16)

# Multiplications from which oneDNN, which takes 20 microseconds for anything, is the faster one.
_FEWEST_PRODUCTS = 1 << 22

_IS_WINDOWS = os.name == "nt"
_CPU_INFO = Path("/proc/cpuinfo")


class _Packed(NamedTuple):
    """A rearranged weight, and which state of the weight it is of."""

    weight: Tensor
    source: tuple[int, int, torch.dtype]


# Not in the modules: rearranged tensors can be neither copied nor saved.
_packed: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


class Linear(nn.Linear):
    """`nn.Linear`, which uses what `pack_weights` has rearranged where there is no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """x (R, D), or (..., D) -> (R, F), or (..., F)."""
        weight = self._weight_for_onednn(x)
        if weight is None:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(self(x)); in one pass where oneDNN computes it."""
        weight = self._weight_for_onednn(x)
        if weight is None:
            return F.gelu(self(x))
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "gelu", [], "none")

    def _weight_for_onednn(self, x: Tensor) -> Tensor | None:
        """The weight, rearranged if that has been done, if oneDNN is to compute this product."""
        if torch.is_grad_enabled() or x.dtype != self.weight.dtype or not x.is_cpu:
            return None
        packed = self._packed_for(x)
        if packed is not None:
            return packed
        is_large = x.dtype == torch.float32 and x.numel() * self.out_features >= _FEWEST_PRODUCTS
        return self.weight if is_large and _leaves_mkl() and not _is_observed(x) else None

    def _packed_for(self, x: Tensor) -> Tensor | None:
        """The rearranged weight, if there is one and it serves x."""
        packed = _packed.get(self) if x.dim() == 2 and x.shape[0] <= _MOST_ROWS else None
        if packed is None or packed.source != _source(self.weight) or torch.is_autocast_enabled("cpu"):
            return None
        return packed.weight


@torch.no_grad()
def pack_weights(*modules: nn.Module) -> None:
    """Rearranges the weights of all `Linear` in these modules for few rows, unless they are so already.

    On a CPU in float32 and bfloat16, else nothing happens. It takes as much memory again as the weights, until the
    modules go; weights that change meanwhile are noticed and used as they are until they are packed again.
    """
    for module in modules:
        for linear in module.modules():
            if isinstance(linear, Linear) and _can_pack(linear.weight):
                packed = _packed.get(linear)
                source = _source(linear.weight)
                if packed is None or packed.source != source:
                    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _MOST_ROWS)
                    _packed[linear] = _Packed(weight, source)


def _is_observed(x: Tensor) -> bool:
    """Whether something changes or looks at operations: autocast, a compiler, an exporter, one that counts."""
    return (
        type(x) not in (Tensor, nn.Parameter)
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
    )


@cache
def _leaves_mkl() -> bool:
    """Whether float32 products are MKL's, and the processor has 512-bit units that MKL does not use."""
    has_wide_units = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return has_wide_units and torch.backends.mkl.is_available() and _has_onednn() and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """The processor's maker, as the processor calls it; empty if that is not known."""
    if _IS_WINDOWS:
        return os.environ.get("PROCESSOR_IDENTIFIER", "").rpartition(", ")[2]
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _has_onednn() -> bool:
    ops = torch.ops.mkldnn
    is_on = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # pyright: ignore
    return bool(is_on) and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")


def _source(weight: Tensor) -> tuple[int, int, torch.dtype]:
    # Tensors made in inference mode count no changes, but nothing trains them either.
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version, weight.dtype


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        return False
    if not _has_onednn():
        return False
    return weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
