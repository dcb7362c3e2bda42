"""Steps that must not change the weights: which gradients are spikes, and how many bad steps a run bears."""

import statistics
from typing import Any

from opencoca.train.recipe.recipe import Recipe

_WINDOW = 128
_LEAST_KNOWN = 32
_LIMIT_SPAN = 1000
# A deviation of normally distributed numbers is this many times their median absolute one.
_DEVIATIONS_PER_MAD = 1.4826
# Norms that hardly vary would make a spike of the least change.
_LEAST_DEVIATION = 0.05


class SpikeRule:
    """The largest gradient norm that is no spike: ``spike_deviations`` robust deviations above the running median.

    Of the last 128 finite norms m is the median and d, the deviation, 1.4826 times the median distance from m, and at
    least 0.05 m; the limit is m + spike_deviations d. There is none during warm-up, nor before 32 norms are known.
    Norms of steps that were left out count as well: when the level has changed for good, the median follows.
    """

    def __init__(self, recipe: Recipe, progress: dict[str, Any]):
        """progress: where the norms are kept, so that a continued run has them."""
        self.recipe, self.progress = recipe, progress

    def limit(self) -> float:
        """The limit for the next step; infinite if there is none."""
        deviations = self.recipe.safety.spike_deviations
        norms = self.progress.get("gradient_norms", [])
        warming_up = self.progress["step"] < self.recipe.optimizer.warmup_steps
        if not deviations or warming_up or len(norms) < _LEAST_KNOWN:
            return float("inf")
        median = statistics.median(norms)
        spread = statistics.median(abs(norm - median) for norm in norms)
        return median + deviations * max(_DEVIATIONS_PER_MAD * spread, _LEAST_DEVIATION * median)

    def add(self, norm: float) -> None:
        """Takes the norm of a step's whole gradient into account."""
        if self.recipe.safety.spike_deviations:
            self.progress["gradient_norms"] = [*self.progress.get("gradient_norms", []), norm][-_WINDOW:]


def too_many_non_finite(recipe: Recipe, progress: dict[str, Any]) -> bool:
    """Counts the present step as one whose loss or gradient is not finite; True if the run has too many such steps."""
    step = progress["step"]
    recent = [bad for bad in progress.get("non_finite_steps", []) if bad > step - _LIMIT_SPAN]
    progress["non_finite_steps"] = [*recent, step]
    return len(progress["non_finite_steps"]) > recipe.safety.non_finite_limit
