"""One optimizer step: the batch's gradient, clip, check, update. No file, no clock, no printing."""

import math
from dataclasses import asdict, dataclass

import torch

from opencoca.data.batch import Batch
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
    """What one step gave. Losses in nats; lr is that of the main group; images and tokens of all processes.

    skipped: whether the gradient was too long and nothing was changed.
    """

    loss: float
    contrastive_loss: float | None
    caption_loss: float | None
    grad_norm: float
    logit_scale: float
    lr: float
    images: int
    tokens: int
    skipped: bool = False

    def to_dict(self) -> dict[str, float]:
        """All but the counts, which do not average."""
        values = asdict(self)
        counts = ("images", "tokens", "skipped")
        return {key: values[key] for key in values if values[key] is not None and key not in counts}


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
        """parallel: the model as the processes share it; by default there is one process."""
        self.model, self.optimizer, self.average, self.recipe = model, optimizer, average, recipe
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
        losses, images, tokens = self.batch_gradient(batch, step)
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
            if options.grad_clip > 0:
                self.parallel.clip_gradients(options.grad_clip, norm)
            self.optimizer.step()
            # Fused optimizers do not count their changes, and what is kept of weights (model/linear.py) goes by them.
            torch.autograd.graph.increment_version(self.parallel.parameters)
            self.model.clamp_logit_scale()
            if self.average is not None:
                self.average.update(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        return StepMetrics(
            loss=float(losses.total),
            contrastive_loss=None if losses.contrastive is None else float(losses.contrastive),
            caption_loss=None if losses.caption is None else float(losses.caption),
            grad_norm=float(norm),
            logit_scale=float(self.model.logit_scale.detach()),
            lr=options.learning_rate * factor,
            images=images,
            tokens=tokens,
            skipped=skipped,
        )
