"""Training: a recipe in, a model folder out."""

from pathlib import Path

from opencoca.train.recipe import Recipe, load_recipe


def train(recipe: Recipe) -> Path:
    """Runs (or continues) the recipe; returns the folder of the run, which is a model folder with the best weights."""
    from opencoca.train.trainer import Trainer

    return Trainer(recipe).run()


__all__ = ["Recipe", "load_recipe", "train"]
