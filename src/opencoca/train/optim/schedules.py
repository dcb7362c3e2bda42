"""How the learning rate runs: linear warm-up, then one of four decays."""

import math

from opencoca.train.recipe.optimizer import OptimizerRecipe


def learning_rate_factor(step: int, total_steps: int, options: OptimizerRecipe) -> float:
    """What the peak learning rate is multiplied by in step ``step`` (from 0) of ``total_steps``."""
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
