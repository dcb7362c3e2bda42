"""Gives a sharded model the initial values that it would have in one process.

A model of many billion bytes is built without values and sharded first, so that no process ever holds all of it. Each
process then draws one whole parameter after the other, from the same seed and in the same order, and keeps its rows.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from opencoca.distributed.world import local_part, sharded_like
from opencoca.model.coca import CoCa

# Methods of tensors and functions of torch.nn.init.
_DRAWS = {"normal_", "uniform_", "trunc_normal_"}
_DRAWS |= {f"{rule}_{kind}_" for rule in ("kaiming", "xavier") for kind in ("normal", "uniform")}


@torch.no_grad()
def fill_initial_values(model: CoCa, device: torch.device, seed: int) -> None:
    """Gives a model that was built and sharded on the meta device the values that ``CoCa(config)`` has after ``seed``.

    All processes must call. The image encoder must be one that `CoCa.init_weights` fills.
    """
    torch.manual_seed(seed)
    with torch.device("meta"), _Draw(keep=False):  # takes the random numbers that the constructors take
        CoCa(model.config)
    model.to_empty(device=device)
    model.tie_head()  # `to_empty` has given head and embedding a tensor each
    for parameter in model.parameters():
        local_part(parameter).fill_(math.nan)
    with _Draw(keep=True):
        model.init_weights()
    missed = [name for name, parameter in model.named_parameters() if local_part(parameter).isnan().any()]
    assert not missed, f"no initial value for {missed[0]}"


class _Draw(TorchFunctionMode):
    """Random values are drawn on the CPU for the whole tensor; keep: this process's rows of them become its values."""

    def __init__(self, keep: bool):
        super().__init__()
        self.keep = keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") not in _DRAWS:
            return func(*args, **kwargs)
        target: Tensor = args[0] if args else kwargs.pop("tensor")
        whole = torch.empty(target.shape, dtype=target.dtype, device="cpu")
        func(whole, *args[1:], **kwargs)
        if self.keep:
            drawn = sharded_like(whole, target)
            local_part(target).copy_(drawn.to_local() if isinstance(drawn, DTensor) else drawn)
        return target
