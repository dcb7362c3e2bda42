"""Linear maps of few rows on a CPU: weights in the order in which the matrix kernel reads them.

A product of few rows with a weight costs little more than rearranging the weight for the kernel, which it does anew in
every call. Decoding calls each weight once a word, so it is worth keeping it rearranged: on two cores, steps of 8 rows
take about 0.7 and steps of 48 rows about 0.87 of the time.

Letters: R rows, D width in, F width out.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Beyond it rearranging is a small part of the product.
_MOST_ROWS = 256
_DTYPES = (torch.float32, torch.bfloat16)


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
        packed = self._packed_for(x)
        if packed is None:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(self(x)); with rearranged weights in one pass."""
        packed = self._packed_for(x)
        if packed is None:
            return F.gelu(self(x))
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "gelu", [], "none")

    def _packed_for(self, x: Tensor) -> Tensor | None:
        """The rearranged weight, if there is one and it serves x."""
        if x.dim() != 2 or x.shape[0] > _MOST_ROWS or torch.is_grad_enabled() or x.dtype != self.weight.dtype:
            return None
        packed = _packed.get(self)
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


def _source(weight: Tensor) -> tuple[int, int, torch.dtype]:
    # Tensors made in inference mode count no changes, but nothing trains them either.
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version, weight.dtype


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # pyright: ignore
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
