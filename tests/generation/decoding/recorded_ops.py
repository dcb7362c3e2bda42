"""A recorder of decoding steps without CUDA: it replays operations on the tensors that they had, as a graph does.

Whatever was a number in Python when a step was recorded is the same in every replay; so is where tensors lie.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedOps:
    """Counts what it records. ``fails``: raises as CUDA would for what cannot be recorded."""

    memory = math.inf

    def __init__(self, fails: bool = False):
        self.fails = fails
        self.num_recorded = self.num_replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1
        with _Recording() as recording:
            output = function()
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> Tensor:
            self.num_replayed += 1
            for run in recording.operations:
                run()
            return output

        return replay


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        given = [_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        assert made or not given, f"{func} takes a number out of a tensor, which waits for the device"
        if func._schema.is_mutable or any(_place(x) not in given for x in made):
            self.operations.append(lambda: _run_again(func, args, kwargs, made, given))
        return outputs


def _run_again(func: Any, args: Any, kwargs: Any, made: list[Tensor], given: list[int]) -> None:
    for old, new in zip(made, (x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)), strict=True):
        if _place(old) not in given:
            old.copy_(new)


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else id(x)
