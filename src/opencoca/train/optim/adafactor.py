"""Adafactor, as contrastive captioners were trained with it: learning rates that are given, decoupled weight decay.

Shazeer and Stern, arXiv 1804.04235; with a first moment in bfloat16 and a limit to the second moment's decay as Zhai
et al., arXiv 2106.04560, section 3.4. Letters: R rows, C columns of a matrix.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Added to squared gradients; matrices with a side below the second are not factored; the largest root mean square of
# an update (section 6: clipping); how fast the decay of the second moment comes to its limit (section 7.2).
_EPS, _LEAST_SIDE, _LARGEST_UPDATE, _DECAY_POWER = 1e-30, 32, 1.0, 0.8


class Adafactor(torch.optim.Optimizer):
    """Second moments of a matrix are kept as their means over rows (C,) and columns (R,), R + C numbers for R x C.

    betas: decay of the mean of updates (0: none is kept), and the largest decay of the squared gradients'.
    Weights decay by lr * weight_decay a step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state, group["betas"][0])
        state["step"] += 1
        decay = min(group["betas"][1], 1 - float(state["step"]) ** -_DECAY_POWER)
        update = _as_matrix(grad.to(torch.promote_types(grad.dtype, torch.float32)))
        squares = update.square().add_(_EPS)
        if "exp_avg_sq" in state:
            moment = state["exp_avg_sq"].view_as(squares).lerp_(squares, 1 - decay)
            update = update * moment.rsqrt()
        else:
            rows = state["row_mean_sq"].lerp_(squares.mean(dim=1), 1 - decay)
            columns = state["column_mean_sq"].lerp_(squares.mean(dim=0), 1 - decay)
            update = update * (rows / rows.mean()).rsqrt()[:, None]
            update *= columns.rsqrt()
        update /= (update.square().mean().sqrt() / _LARGEST_UPDATE).clamp(min=1.0)
        update = update.view(parameter.shape)
        if "exp_avg" in state:
            mean = state["exp_avg"].to(update.dtype).lerp_(update, 1 - group["betas"][0])
            state["exp_avg"].copy_(mean)
            update = mean
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])

    @staticmethod
    def _begin(parameter: Tensor, state: dict[str, Any], first_beta: float) -> None:
        state["step"] = torch.tensor(0.0)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        matrix = _as_matrix(parameter)
        if matrix.dim() == 2 and min(matrix.shape) >= _LEAST_SIDE:
            state["row_mean_sq"] = parameter.new_zeros(matrix.shape[0], dtype=wide)
            state["column_mean_sq"] = parameter.new_zeros(matrix.shape[1], dtype=wide)
        else:
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
        if first_beta:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)


def _as_matrix(x: Tensor) -> Tensor:
    """(R, ...) -> (R, C); vectors and scalars stay."""
    return x.reshape(x.shape[0], -1) if x.dim() > 2 else x
