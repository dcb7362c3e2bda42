"""One optimizer step: the batch's gradient, clip, check, update. No file, no clock, no printing."""

import math
from dataclasses import dataclass

import torch

from opencoca.data import Batch
from opencoca.model.coca import CoCa
from opencoca.train.gradient import BatchGradient
from opencoca.train.optim.optimizer import WeightAverage, set_learning_rate
from opencoca.train.optim.schedules import learning_rate_factor
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe.recipe import Recipe


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is not a number or infinite; no parameter was changed."""


@dataclass(frozen=True)
class StepMetrics:
    """What one step gave.

    loss: the weighted total; terms: each term by name, without its weight. lr: the main group's learning rate.
    monitors: numbers of the network after the step, by name. samples, tokens: of all processes.
    skipped: whether the gradient was too long and nothing was changed.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float
    lr: float
    monitors: dict[str, float]
    samples: int
    tokens: int
    skipped: bool = False

    def averaged(self) -> dict[str, float]:
        """What a line of the log gives as a mean over several steps."""
        named = {f"{name}_loss": value for name, value in self.terms.items()}
        return {"loss": self.loss, **named, "grad_norm": self.grad_norm}

    def latest(self) -> dict[str, float]:
        """What a line of the log gives as it is after the last of several steps."""
        return {"lr": self.lr, **self.monitors}


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
        options = self.recipe.optimizer
        factor = learning_rate_factor(step, total_steps, options)
        set_learning_rate(self.optimizer, factor)
        losses, samples, tokens = self.batch_gradient(batch, step)
        norm = self.parallel.gradient_norm()
        if not (torch.isfinite(norm) and torch.isfinite(losses.total)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLossError(
                f"step {step}: the loss is {float(losses.total)} and the gradient's norm {float(norm)}; no parameter "
                "was changed. Lower optimizer.learning_rate, set optimizer.grad_clip, or check the data."
            )
        # Devices of different kinds may round differently, and all must do the same.
        skipped = norm_limit < math.inf and any(self.parallel.world.any(float(norm) > norm_limit))
        if not skipped:
            self._update(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return StepMetrics(
            loss=float(losses.total),
            terms={name: float(value) for name, value in losses.terms.items()},
            grad_norm=float(norm),
            lr=options.learning_rate * factor,
            monitors=self.parallel.task.monitors(self.parallel.model),
            samples=samples,
            tokens=tokens,
            skipped=skipped,
        )

    def _update(self, norm: torch.Tensor) -> None:
        model, grad_clip = self.parallel.model, self.recipe.optimizer.grad_clip
        if grad_clip > 0:
            self.parallel.clip_gradients(grad_clip, norm)
        self.optimizer.step()
        # Fused optimizers do not count their changes, and what is kept of weights (packed ones) goes by them.
        torch.autograd.graph.increment_version(self.parallel.parameters)
        self.parallel.task.after_update(model)
        if self.average is not None:
            self.average.update(model)
