"""The forward pass of a training step on tensors that have shapes and no values, and what it keeps for the gradient.

The network itself runs, with the very lengths of a batch of texts, so that nothing is estimated that the code decides.
Numbers are on the meta device; ids and masks, which decide shapes, are real. While it runs, tensors claim to be on the
device that is planned for: the network chooses its kernels by it. Autocast, which does not know the meta device, is
done here by the same rule: which functions take low precision, which float32.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from opencoca.data import Batch
from opencoca.model.coca import CoCa
from opencoca.model.structure import Tower, Unit
from opencoca.tasks import Task

_LOW = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "conv2d", "einsum",
    "scaled_dot_product_attention",
}  # fmt: skip
# CUDA's autocast alone computes these in float32.
_WIDE_ON_CUDA = {"layer_norm", "softmax", "log_softmax", "exp", "log", "norm", "sum", "cumsum", "prod", "group_norm"}
_FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn"}


@dataclass
class Kept:
    """The bytes that one unit (a block, a stage, a pooler) keeps for its gradient.

    input_bytes: its input, which is all that stays if its inside is computed again. largest_bytes: its largest tensor.
    recomputable: the tower that it is a block of; None if it is no block, and so cannot be computed again.
    """

    part: str
    recomputable: Tower | None = None
    kept_bytes: int = 0
    input_bytes: int = 0
    largest_bytes: int = 0


@dataclass
class Trace:
    """What a forward pass keeps, unit by unit in the order of execution.

    weight_copy_bytes: the weights in low precision, which autocast makes once in each pass. words: the number of words
    that the captioning loss is taken of. hidden_dtype: the type of the states that go into the vocabulary head.
    """

    units: dict[str, Kept] = field(default_factory=dict)
    weight_copy_bytes: int = 0
    words: int = 0
    hidden_dtype: torch.dtype = torch.float32


def trace_forward(model: CoCa, task: Task, batch: Batch, *, device_type: str, precision: str) -> Trace:
    """Runs a task's forward pass on ``model``, whose parameters are on the meta device, and a batch without images.

    The batch's texts are real; in place of images, tensors without values go in at the stage that the batch names.
    device_type: cpu or cuda, whose kernels the network may choose.
    """
    inputs = _inputs(model, batch.num_samples, batch.from_stage)
    tracer = _Tracer(model, inputs)
    with ExitStack() as stack:
        for handle in tracer.watch():
            stack.callback(handle.remove)
        low = torch.bfloat16 if precision == "bf16" else None
        stack.enter_context(_on_device(device_type, low))
        stack.enter_context(saved_tensors_hooks(tracer.keep, lambda tensor: tensor))
        mode = stack.enter_context(_ShapesOnly(device_type, low))
        outputs = task.forward(model, replace(batch, images=inputs))
    trace = tracer.trace
    copies = {tensor.untyped_storage()._cdata for tensor in mode.weight_copies.values()}
    trace.weight_copy_bytes = sum(copy.numel() * copy.element_size() for copy in mode.weight_copies.values())
    tracer.settle(copies)
    if task.uses.captioning:
        trace.words, trace.hidden_dtype = len(outputs.own[0]), outputs.own[0].dtype
    return trace


def _inputs(model: CoCa, num_images: int, from_stage: int) -> Tensor:
    images = torch.empty(num_images, 3, *model.config.image.image_size, device="meta")
    with torch.no_grad():
        return model.image_features(images, 0, from_stage)


@contextmanager
def _on_device(device_type: str, low: torch.dtype | None) -> Iterator[None]:
    """Sets autocast's own state, which the network asks for: whether it is on, and its type."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, low is not None)
    torch.set_autocast_dtype(device_type, low or torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


class _ShapesOnly(TorchFunctionMode):
    """Keeps floating-point tensors on the meta device, under another device's name and autocast rules."""

    def __init__(self, device_type: str, low: torch.dtype | None):
        super().__init__()
        self.device, self.low = torch.device(device_type), low
        self.weight_copies: dict[int, Tensor] = {}
        self._weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and func == Tensor.device.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return self.device
        if name in _FACTORIES and torch.empty((), dtype=kwargs.get("dtype")).is_floating_point():
            return func(*args, **kwargs | {"device": "meta"})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == self.device:
            kwargs["device"] = "meta" if any(map(_is_shape, args)) else "cpu"
        if not any(map(_is_shape, tree_leaves((args, kwargs)))) or name in ("__set__", "__get__"):
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._fused_attention(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._cast_for(name), (args, kwargs))
        result = func(*args, **kwargs)
        if name == "to" and isinstance(args[0], nn.Parameter) and result is not args[0]:
            self.weight_copies[id(result)] = result  # the network's own casting, which nothing caches
        return result

    def _cast_for(self, name: str) -> Any:
        wide = name in _WIDE_ON_CUDA and self.device.type == "cuda"

        def cast(x: Tensor) -> Tensor:
            x = x if x.is_meta else x.to("meta")
            if self.low is None or not x.is_floating_point() or x.dtype == torch.float64:
                return x
            if name in _LOW:
                return self._in_low_precision(x)
            return x.to(torch.float32) if wide else x

        return cast

    def _in_low_precision(self, x: Tensor) -> Tensor:
        if x.dtype == self.low:
            return x
        if not isinstance(x, nn.Parameter) or not x.requires_grad:
            return x.to(self.low)
        if id(x) not in self.weight_copies:
            self.weight_copies[id(x)] = x.to(self.low)
        return self.weight_copies[id(x)]

    def _fused_attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **_: Any) -> Tensor:
        if self.low is not None:
            query, key, value = map(self._in_low_precision, (query, key, value))
        return _FusedAttention.apply(query, key, value)  # pyright: ignore[reportReturnType]


class _FusedAttention(torch.autograd.Function):
    """What flash attention keeps: queries, keys, values, the result, and a number for every query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mixed, sums)
        return mixed

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("only the forward pass is traced")


class _Tracer:
    """Writes down, unit by unit, which storages are kept for the gradient; each counts where it was kept first."""

    def __init__(self, model: CoCa, inputs: Tensor):
        self.model, self.trace, self.current = model, Trace(), ""
        self.known = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers(), inputs)}
        # Held, so that none is freed and its place taken by another one.
        self.kept: dict[int, tuple[Tensor, int, str]] = {}

    def watch(self) -> Iterable[Any]:
        structure = self.model.structure()
        for name, module in self.model.named_modules():
            if not any(True for _ in module.children()):
                yield module.register_forward_pre_hook(self._entering(structure.unit_of(name)))

    def _entering(self, unit: Unit) -> Any:
        tower = unit.part.tower if unit.block else None

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self.current != unit.name:
                self.current = unit.name
                shown = next((arg for arg in args if isinstance(arg, Tensor)), None)
                size = 0 if shown is None else shown.numel() * shown.element_size()
                self.trace.units.setdefault(unit.name, Kept(unit.part.name, tower, input_bytes=size))

        return enter

    def keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self.known and storage not in self.kept:
            self.kept[storage] = (tensor, tensor.untyped_storage().nbytes(), self.current)
        return tensor

    def settle(self, copies_of_weights: set[int]) -> None:
        for storage, (_, size, unit) in self.kept.items():
            if storage in copies_of_weights:
                continue
            kept = self.trace.units.setdefault(unit, Kept("image_encoder"))
            kept.kept_bytes += size
            kept.largest_bytes = max(kept.largest_bytes, size)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_shape(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_meta
