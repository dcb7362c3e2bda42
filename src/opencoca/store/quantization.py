"""Stores weights of linear maps and token embeddings in 8 bits: a quarter of float32's memory, and faster on a CPU.

Quantization is symmetric, with one scale for each output channel (arXiv 2004.09602, section 3). On a CPU with AVX-512
and in float32 the product itself is computed in integers: its input is rounded to 8 bits with one scale for each row,
so that no row depends on its batch. Elsewhere the weights are expanded once and multiplied as usual. Convolutions,
norms, biases, positions and learned queries keep their type.
Letters: O outputs of a linear map, or words of a vocabulary; C channels in.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.system.cpu import has_avx512

INT8 = "int8"
"""What config.json calls this."""

_LARGEST = 127


class Int8Rows(NamedTuple):
    """A matrix in 8 bits: values (O, C) int8 times scale (O,) float32, a scale for each row."""

    values: Tensor
    scale: Tensor


def quantize_rows(matrix: Tensor) -> Int8Rows:
    """Rounds a matrix (O, C) to 8 bits; the largest magnitude of each row becomes 127."""
    rows = matrix.detach().float()
    scale = (rows.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    values = (rows / scale[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return Int8Rows(values, scale)


class _Quantized(nn.Module):
    """Holds a matrix in the buffers values (O, C) int8 and scale (O,)."""

    values: Tensor
    scale: Tensor

    def __init__(self, rows: Int8Rows):
        super().__init__()
        self.register_buffer("values", rows.values)
        self.register_buffer("scale", rows.scale)

    @property
    def weight(self) -> Tensor:
        """The matrix (O, C), expanded at each call."""
        return self.values.to(self.scale.dtype) * self.scale[:, None]


class QuantizedLinear(_Quantized):
    """Replaces an nn.Linear: (..., C) -> (..., O)."""

    def __init__(self, rows: Int8Rows, bias: Tensor | None = None):
        super().__init__(rows)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._expanded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._computes_in_integers(x):
            return _int8_linear(x, self.values, self.scale, self.bias)
        if self._expanded is None or (self._expanded.dtype, self._expanded.device) != (x.dtype, x.device):
            self._expanded = self.weight.to(x.dtype)
        return F.linear(x, self._expanded, self.bias)

    def _computes_in_integers(self, x: Tensor) -> bool:
        plain = x.device.type == "cpu" and x.dtype == torch.float32 == self.scale.dtype and x.numel() > 0
        return plain and _HAS_FAST_INTEGERS and not (torch.is_grad_enabled() and x.requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_expanded": None}  # made anew by a copy

    def _apply(self, *args: Any, **options: Any) -> "QuantizedLinear":
        self._expanded = None
        return super()._apply(*args, **options)


# Without these instructions the product of integers is slower than that of floats.
_HAS_FAST_INTEGERS = has_avx512()


def _int8_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    step = (rows.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (rows / step).round_().to(torch.int8)
    products = torch._int_mm(rounded, values.t())  # pyright: ignore[reportPrivateImportUsage]
    result = products.float().mul_(step).mul_(scale)
    if bias is not None:
        result.add_(bias)
    return result.view(*x.shape[:-1], len(scale))


class QuantizedEmbedding(_Quantized):
    """Replaces an nn.Embedding: ids (...) -> (..., C)."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.values).to(self.scale.dtype) * F.embedding(ids, self.scale[:, None])


def quantize(model: nn.Module) -> None:
    """Replaces every nn.Linear and nn.Embedding of a model, in place; modules that shared a weight still do.

    A model on the meta device gets buffers without values, for `load_state_dict` to fill.
    """
    done: dict[int, Int8Rows] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear | nn.Embedding):
                if id(child.weight) not in done:
                    done[id(child.weight)] = quantize_rows(child.weight)
                setattr(module, name, _replacement(child, done[id(child.weight)]))


def _replacement(module: nn.Linear | nn.Embedding, rows: Int8Rows) -> nn.Module:
    return QuantizedLinear(rows, module.bias) if isinstance(module, nn.Linear) else QuantizedEmbedding(rows)


def dequantize(model: nn.Module) -> None:
    """Replaces quantized modules by ordinary ones of the same values, in place; shared weights stay shared."""
    done: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuantizedLinear | QuantizedEmbedding):
                if id(child.values) not in done:
                    done[id(child.values)] = nn.Parameter(child.weight)
                setattr(module, name, _restored(child, done[id(child.values)]))


def _restored(module: QuantizedLinear | QuantizedEmbedding, weight: nn.Parameter) -> nn.Module:
    with torch.device("meta"):
        num_rows, width = weight.shape
        if isinstance(module, QuantizedEmbedding):
            restored = nn.Embedding(num_rows, width)
        else:
            restored = nn.Linear(width, num_rows, bias=module.bias is not None)
            restored.bias = module.bias  # pyright: ignore[reportAttributeAccessIssue]
    restored.weight = weight
    return restored


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, _Quantized) for module in model.modules())
