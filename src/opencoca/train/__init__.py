"""Training: a recipe in, a model folder out."""

from collections.abc import Sequence
from pathlib import Path

from opencoca.train.recipe.load import load_recipe
from opencoca.train.recipe.recipe import Recipe


def train(recipe: Recipe, continue_with: Sequence[str] = ()) -> Path:
    """Runs (or continues) the recipe; returns the folder of the run, which is a model folder with the best weights.

    Started by `torchrun`, all its processes train one model together.

    Args:
        continue_with: keys of the recipe, such as ``["epochs"]``, in which it may differ from what the run in the
            folder began with; ``data`` also allows that the samples under the same names have changed.
    """
    from opencoca.distributed.world import join_world
    from opencoca.train.trainer import Trainer

    with join_world(recipe.distributed.timeout_minutes) as world:
        return Trainer(recipe, world, continue_with=continue_with).run()


__all__ = ["Recipe", "load_recipe", "train"]
