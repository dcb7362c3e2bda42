"""Muon for the hidden matrices, AdamW for the rest.

Keller Jordan et al., kellerjordan.github.io/posts/muon: the running mean of a matrix's gradient, orthogonalised, is its
update. Scaled as Liu et al., arXiv 2502.16982, section 2.2, so that AdamW's learning rate and weight decay carry over.
torch.optim.Muon orthogonalises a parameter as it is stored; keys and values, or the two halves of a gated MLP, are two
maps in one parameter here, and each is orthogonalised by itself.

Letters: G maps stacked in one parameter, R rows and C columns of one map.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from opencoca.model.coca import CoCa
from opencoca.system.cpu import multiplies_bfloat16

# The odd polynomial a x + b x^3 + c x^5 that each step of the iteration applies to all singular values (the post).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# The root mean square of AdamW's updates, to which those of Muon are scaled (arXiv 2502.16982, section 2.2).
_ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Muon for groups that have ``maps``, how many maps are stacked in each of their parameters; AdamW for the others.

    groups: of both kinds, each with params, lr and weight_decay. momentum (with Nesterov's look ahead) is Muon's; betas
    and eps are AdamW's. Weights decay by lr * weight_decay a step.
    Raises ValueError for a parameter that is no matrix of so many maps.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        groups = list(groups)
        hidden = [group for group in groups if "maps" in group]
        for group in hidden:
            for parameter in group["params"]:
                if parameter.ndim != 2 or parameter.shape[0] % group["maps"]:
                    raise ValueError(f"muon cannot divide a {tuple(parameter.shape)} into {group['maps']} maps")
        others = [group for group in groups if "maps" not in group]
        fused = {"betas": betas, "eps": eps, "fused": True}
        self._adamw = torch.optim.AdamW(others, lr, weight_decay=weight_decay, **fused) if others else None
        shared = self._adamw.param_groups if self._adamw else []
        super().__init__([*hidden, *shared], {"lr": lr, "weight_decay": weight_decay})
        self.momentum = momentum
        if self._adamw:  # one state and one list of groups, so that schedules and checkpoints see a single optimizer
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"] if "maps" in group else ():
                if (grad := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                mean = state["momentum_buffer"].lerp_(grad, 1 - self.momentum)
                maps = grad.lerp(mean, self.momentum).unflatten(0, (group["maps"], -1))
                update = orthogonalised(maps).flatten(0, 1).to(parameter.dtype)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * _ADAMW_RMS * math.sqrt(max(maps.shape[1:])))
        if self._adamw:
            self._adamw.step()


def orthogonalised(matrices: Tensor) -> Tensor:
    """matrices (G, R, C) with all their singular values near 1 (0.7 to 1.2, but for the very small): (G, R, C).

    Newton-Schulz iteration: products alone, no decomposition. bfloat16 is enough for it, and the result is in it; on a
    CPU without instructions for it, where such products take many times longer, both are in float32.
    """
    is_slow = matrices.device.type == "cpu" and not multiplies_bfloat16()
    x = matrices.to(torch.float32 if is_slow else torch.bfloat16)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def divide_groups(model: CoCa, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with their hidden matrices in groups of their own, by how many maps each holds (``maps``)."""
    maps = model.structure().hidden_matrices()
    divided: list[dict[str, Any]] = []
    for group in groups:
        by_maps: dict[int, list[Tensor]] = {}
        for parameter in group["params"]:
            by_maps.setdefault(maps.get(parameter, 0), []).append(parameter)
        for count, parameters in by_maps.items():
            divided.append(group | {"params": parameters} | ({"maps": count} if count else {}))
    return divided
