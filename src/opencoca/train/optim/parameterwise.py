"""What this project's own optimizers share: parameters that have a gradient are updated one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ParameterwiseOptimizer(torch.optim.Optimizer):
    """An optimizer whose subclasses say how one parameter is updated."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError
