"""Training: a recipe in, a model folder out."""

from pathlib import Path

from opencoca.train.recipe.load import load_recipe
from opencoca.train.recipe.recipe import Recipe


def train(recipe: Recipe) -> Path:
    """Runs (or continues) the recipe; returns the folder of the run, which is a model folder with the best weights.

    Started by `torchrun`, all its processes train one model together.
    """
    from opencoca.distributed.world import join_world
    from opencoca.train.trainer import Trainer

    with join_world(recipe.distributed.timeout_minutes) as world:
        return Trainer(recipe, world).run()


__all__ = ["Recipe", "load_recipe", "train"]
