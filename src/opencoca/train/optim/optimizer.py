"""The optimizer with the right parameter groups, its learning rates, what is frozen, and the average of the weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from opencoca.model.coca import CoCa
from opencoca.tasks import Task, make_task
from opencoca.train.optim.adafactor import Adafactor
from opencoca.train.optim.muon import Muon, divide_groups
from opencoca.train.recipe.optimizer import OptimizerRecipe
from opencoca.train.recipe.recipe import Recipe

MakeOptimizer = Callable[[CoCa, Recipe], torch.optim.Optimizer]
"""What `build_optimizer` is; each group of what it makes has ``lr`` and ``peak_lr``."""


def freeze(model: CoCa, recipe: Recipe, task: Task | None = None) -> int:
    """Stops gradients of what the recipe freezes, and of what its task does not reach.

    Returns how many of the image encoder's first stages are frozen.
    Raises ValueError if it has fewer than the recipe freezes, and if nothing is left to train.
    """
    task = task or make_task(recipe.task)
    structure, encoder = model.structure(), model.structure().image_encoder
    asked = recipe.encoder.frozen_stages
    count = encoder.num_stages if asked == -1 else asked
    if not 0 <= count <= encoder.num_stages:
        raise ValueError(f"encoder.frozen_stages {asked}: this image encoder has {encoder.num_stages} stages")
    encoder.stages[:count].requires_grad_(False)
    for parameter in task.unreached(model):
        parameter.requires_grad_(False)
    for parameter in structure.parameters(*recipe.optimizer.frozen):
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("everything is frozen (optimizer.frozen, encoder.frozen_stages): nothing would be learned")
    return count


def parameter_groups(model: CoCa, recipe: Recipe) -> list[dict]:
    """Groups by learning rate and weight decay; matrices decay, all else (norms, biases, positions, ...) does not."""
    optimizer = recipe.optimizer
    rates = dict(optimizer.learning_rates)
    if recipe.encoder.learning_rate is not None:
        rates["image_encoder"] = recipe.encoder.learning_rate
    structure = model.structure()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = rates.get(structure.part_of(name), optimizer.learning_rate)
        if optimizer.layer_decay != 1:
            lr *= optimizer.layer_decay ** structure.layers_behind(name)
        decay = optimizer.weight_decay if structure.decays(name, parameter) else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def build_optimizer(model: CoCa, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over what is trained; ``peak_lr`` of each group is the rate that the schedule scales."""
    options, groups = recipe.optimizer, parameter_groups(model, recipe)
    if options.name == "adafactor":
        return Adafactor(groups, options.learning_rate, options.betas)
    if options.name == "muon":
        return Muon(divide_groups(model, groups), options.learning_rate, betas=options.betas, eps=options.eps)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True)


def learning_rate_factor(step: int, total_steps: int, options: OptimizerRecipe) -> float:
    """What the peak learning rates are multiplied by in step ``step`` (from 0) of ``total_steps``.

    Linear warm-up, then one of four decays.
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.decay == "constant":
        return 1.0
    start = options.warmup_steps
    if options.decay == "wsd":
        start = max(start, total_steps - round(options.decay_fraction * total_steps))
    done = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if options.decay == "cosine" else 1 - done
    return options.final_lr_fraction + (1 - options.final_lr_fraction) * left


class WeightAverage:
    """Exponential moving average of the trained parameters; it starts fast, so that early averages are useful.

    decay of step t is min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, model: nn.Module, decay: float):
        """model: as it is trained; where processes share it, after it was spread over them."""
        self.decay = decay
        self.updates = 0
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the parameters with their averages; a second call undoes the first."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))
