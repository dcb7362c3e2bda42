"""Linear maps on a CPU without gradient, by the faster of PyTorch's two libraries for matrix products.

Weights in the order in which oneDNN's kernel reads them: a product of few rows costs little more than rearranging the
weight for the kernel, which it does anew in every call. Decoding calls each weight once a word, so it is worth keeping
it rearranged: on two cores, steps of 8 rows take about 0.7 and steps of 48 rows about 0.87 of the time.

oneDNN for large products in float32 where MKL, which PyTorch takes, runs on another maker's processor and leaves its
512-bit units unused: 430 GFLOP/s instead of 187 on two cores of an AMD EPYC.

Letters: R rows, D width in, F width out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opencoca.system.cpu import cpu_vendor, has_avx512

# Beyond it rearranging is a small part of the product.
_MOST_ROWS = 256
_DTYPES = (torch.float32, torch.bfloat16)

# Multiplications from which oneDNN, which takes 20 microseconds for anything, is the faster one.
_FEWEST_PRODUCTS = 1 << 22


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A rearranged weight, which its `Linear` uses for as long as somebody else holds it.

    state: of the weight when it was rearranged, see `_state_of`; original: that weight, lest another one take its place
    in memory.
    """

    weight: Tensor
    state: tuple[int, int, torch.dtype]
    original: Tensor


class Linear(nn.Linear):
    """`nn.Linear`, which uses what `pack_weights` has rearranged where there is no gradient."""

    _packed: "ref[PackedWeight] | None" = None

    def __getstate__(self) -> dict[str, Any]:
        # Rearranged tensors can be neither copied nor saved.
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def forward(self, x: Tensor) -> Tensor:
        """x (R, D), or (..., D) -> (R, F), or (..., F)."""
        weight = None
        if x.is_cpu and x.dtype == self.weight.dtype and not torch.is_grad_enabled():
            packed = self._packed() if self._packed is not None and x.dim() == 2 and x.shape[0] <= _MOST_ROWS else None
            if packed is not None and packed.state == _state_of(self.weight) and not torch.is_autocast_enabled("cpu"):
                weight = packed.weight
            elif x.dtype == torch.float32 and x.numel() * self.out_features >= _FEWEST_PRODUCTS:
                weight = self.weight if _leaves_mkl() and not _is_observed(x) else None
        if weight is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")


@torch.no_grad()
def pack_weights(*modules: nn.Module) -> list[PackedWeight]:
    """Rearranges the weights of all `Linear` in these modules for few rows, unless they are so already.

    On a CPU in float32 and bfloat16, else nothing happens. It takes as much memory again as the weights, and lasts
    while the caller holds what is returned. Weights that change meanwhile are noticed, and used as they are until they
    are packed again.
    """
    found = []
    for linear in (part for module in modules for part in module.modules() if isinstance(part, Linear)):
        if _can_pack(linear.weight):
            packed = None if linear._packed is None else linear._packed()
            original, state = linear.weight.detach(), _state_of(linear.weight)
            if packed is None or packed.state != state:
                weight = torch.ops.mkldnn._reorder_linear_weight(original, _MOST_ROWS)
                packed = PackedWeight(weight, state, original)
                linear._packed = ref(packed)
            found.append(packed)
    return found


def activate_and_project(hidden: Tensor, activate: Callable[[Tensor], Tensor], down: nn.Module) -> Tensor:
    """down(activate(hidden)); in training, what is activated is not kept, but made again for the gradient."""
    trains = torch.is_grad_enabled() and hidden.requires_grad and not torch.compiler.is_compiling()
    if trains and type(down) in (nn.Linear, Linear):
        return _ActivateAndProject.apply(hidden, down.weight, down.bias, activate)
    return down(activate(hidden))


class _ActivateAndProject(torch.autograd.Function):
    # What is activated, and the weight in the type of hidden, would cost more memory than anything else in a block.
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, activate: Any) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.activate, ctx.bias_dtype = activate, None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(hidden.dtype)
        return F.linear(activate(hidden), weight.to(hidden.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_(wants_hidden)
            active = ctx.activate(hidden)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = rows.T @ active.detach().reshape(-1, active.shape[-1]) if wants_weight else None
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = rows.sum(0).to(ctx.bias_dtype) if wants_bias else None
        grad_hidden = torch.autograd.grad(active, hidden, grad @ weight.to(grad.dtype))[0] if wants_hidden else None
        return grad_hidden, grad_weight, grad_bias, None


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
    return has_avx512() and torch.backends.mkl.is_available() and _has_onednn() and cpu_vendor() == "AuthenticAMD"


def _has_onednn() -> bool:
    ops = torch.ops.mkldnn
    is_on = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # pyright: ignore
    return bool(is_on) and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")


def _state_of(weight: Tensor) -> tuple[int, int, torch.dtype]:
    """Where a weight lies, how often it was changed there, and its type: what differs when it is another."""
    # Tensors made in inference mode count no changes, but nothing trains them either.
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version, weight.dtype


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or not _has_onednn():
        return False
    return weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
