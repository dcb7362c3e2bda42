"""One optimizer step: the batch's gradient, clip, check, update. No file, no clock, no printing."""

import math
from typing import NamedTuple

import torch

from opencoca.data import Batch
from opencoca.model.coca import CoCa
from opencoca.train.gradient import BatchGradient
from opencoca.train.optim.optimizer import WeightAverage, learning_rate_factor
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe.recipe import Recipe


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is not a number or infinite; no parameter was changed."""


class StepMetrics(NamedTuple):
    """What one step gave.

    loss: the weighted total; terms: each term by name, without its weight. lr: the main group's learning rate.
    samples, tokens: of all processes. skipped: whether the gradient was too long and nothing was changed.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    skipped: bool


class TrainStep:
    """Applies one batch to the model."""

    def __init__(
        self,
        model: CoCa,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        recipe: Recipe,
        parallel: ParallelModel | None = None,
    ):
        """parallel: the model as the processes share it; by default there is one process, and the recipe's task."""
        self.optimizer, self.average, self.recipe = optimizer, average, recipe
        self.parallel = parallel or ParallelModel(model, next(model.parameters()).device, recipe)
        self.batch_gradient = BatchGradient(self.parallel, recipe)

    def __call__(self, batch: Batch, step: int, total_steps: int, norm_limit: float = math.inf) -> StepMetrics:
        """Step number ``step`` (from 0) of ``total_steps``; batch: this process's part of it.

        norm_limit: a gradient whose norm exceeds this in any process changes nothing.

        Raises NonFiniteLossError, in all processes, before any parameter or optimizer state has changed.
        """
        options, parallel = self.recipe.optimizer, self.parallel
        factor = learning_rate_factor(step, total_steps, options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        losses = self.batch_gradient(batch, step)
        norm = parallel.clip_gradients(options.grad_clip)
        if not (torch.isfinite(norm) and torch.isfinite(losses.total)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLossError(
                f"step {step}: the loss is {float(losses.total)} and the gradient's norm {float(norm)}; no parameter "
                "was changed. Lower optimizer.learning_rate, set optimizer.grad_clip, or check the data."
            )
        # Devices of different kinds may round differently, and all must do the same.
        skipped = norm_limit < math.inf and any(parallel.world.any(float(norm) > norm_limit))
        if not skipped:
            self.optimizer.step()
            # Fused optimizers do not count their changes, and what is kept of weights (packed ones) goes by them.
            torch.autograd.graph.increment_version(parallel.parameters)
            parallel.task.after_update(parallel.model)
            if self.average is not None:
                self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        terms = {name: float(value) for name, value in losses.terms.items()}
        lr = options.learning_rate * factor
        return StepMetrics(float(losses.total), terms, float(norm), lr, losses.samples, losses.tokens, skipped)
