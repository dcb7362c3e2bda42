"""What a step keeps and how its blocks run: recomputed for the gradient, compiled, or as they are."""

import shutil

import torch

from opencoca.model.coca import CoCa
from opencoca.system.devices import choose_precision
from opencoca.train.recipe.recipe import Recipe


def prepare_compute(model: CoCa, recipe: Recipe, device: torch.device) -> None:
    """Sets the model's blocks to what the recipe's ``compute`` asks for, and its patch dropout.

    Raises ValueError where the model has nothing that could be chosen, and where there is no compiler.
    """
    options, structure = recipe.compute, model.structure()
    chosen = [] if options.recompute == "none" else structure.blocks(options.recompute)
    if options.recompute == "image" and not chosen:
        raise ValueError("compute.recompute image needs an image encoder with transformer blocks (vit)")
    for number, block in enumerate(chosen):
        block.recompute = (number + 1) % options.recompute_every == 0
    model.set_patch_dropout(recipe.encoder.patch_dropout)
    if recipe.encoder.patch_dropout and recipe.encoder.cache_features:
        raise ValueError("encoder.patch_dropout and encoder.cache_features exclude each other")
    if options.compile:
        if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ValueError("compute.compile needs a C++ compiler on a CPU, and there is none: install g++ or clang")
        for block in structure.blocks():
            block.compile_parts()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast, or none for fp32; auto is whichever the device is made for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=choose_precision(precision, device) == "bf16")
