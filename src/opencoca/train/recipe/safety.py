"""The part of a recipe about survival: which states of the run are kept, and what happens when a step goes wrong."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointRecipe:
    """Which states of the run are stored, besides every checkpoint_minutes and after every validation.

    Args:
        every_steps: also after every so many steps.
        keep_last: how many of the newest checkpoints stay.
        keep_every_steps: also keeps the first checkpoint of every so many steps; None = none.
        keep_best: also keeps the checkpoint of the best validation.
        in_background: writes while training goes on, from a copy of the state in the CPU's memory; false saves that
            memory and waits for the disk.
        when_unwritable: stop the run if a checkpoint cannot be written (disk full, read-only), or continue with a
            warning and try again when the next one is due; the last one must succeed.
    """

    every_steps: int | None = None
    keep_last: int = 2
    keep_every_steps: int | None = None
    keep_best: bool = False
    in_background: bool = True
    when_unwritable: Literal["stop", "continue"] = "stop"


@dataclass(frozen=True)
class SafetyRecipe:
    """What happens when a step goes wrong; no parameter changes in such a step.

    Args:
        non_finite: when a loss or gradient is not finite: stop, skip (the step changes nothing), or roll_back (to the
            weights of the last checkpoint; the steps since are passed over).
        non_finite_limit: the run stops if more of its last 1000 steps than this were not finite.
        spike_deviations: a step whose gradient norm lies this many robust deviations above the running median changes
            nothing (docs/training.md has the rule); 6 is usual, 0 = never.
        hang_minutes: processes started by torchrun that complete no step for so long write the stacks of their threads
            into the run's folder and exit with code 75, so that torchrun can restart them; one process alone only
            writes its stacks. Shorter than distributed.timeout_minutes, or that ends them first. 0 = never.
    """

    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    non_finite_limit: int = 10
    spike_deviations: float = 0.0
    hang_minutes: float = 8.0
