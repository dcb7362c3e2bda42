"""What a step keeps and how its blocks run: recomputed for the gradient, compiled, or as they are."""

import shutil
from collections.abc import Iterator

import torch
from torch import nn

from opencoca.model.coca import CoCa
from opencoca.model.encoders.vit import VisionTransformer
from opencoca.model.layers.blocks import TransformerBlock
from opencoca.train.recipe.recipe import Recipe


def prepare_compute(model: CoCa, recipe: Recipe, device: torch.device) -> None:
    """Sets the model's blocks to what the recipe's ``compute`` asks for, and its patch dropout.

    Raises ValueError where the model has nothing that could be chosen, and where there is no compiler.
    """
    options, encoder = recipe.compute, model.image_encoder
    chosen = list(_chosen_blocks(model, options.recompute))
    if options.recompute == "image" and not chosen:
        raise ValueError("compute.recompute image needs an image encoder with transformer blocks (vit)")
    for number, block in enumerate(chosen):
        block.recompute = (number + 1) % options.recompute_every == 0
    if recipe.encoder.patch_dropout:
        if not isinstance(encoder, VisionTransformer):
            raise ValueError(f"encoder.patch_dropout needs the image encoder vit, not {model.config.image.name}")
        if recipe.encoder.cache_features:
            raise ValueError("encoder.patch_dropout and encoder.cache_features exclude each other")
        encoder.patch_dropout = recipe.encoder.patch_dropout
    if options.compile:
        if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ValueError("compute.compile needs a C++ compiler on a CPU, and there is none: install g++ or clang")
        for block in _chosen_blocks(model, "all"):
            block.compile_parts()


def _chosen_blocks(model: CoCa, kind: str) -> Iterator[TransformerBlock]:
    roots: list[nn.Module] = [model.image_encoder] if kind in ("image", "all") else []
    roots += [model.unimodal_decoder, model.multimodal_decoder] if kind in ("text", "all") else []
    for root in roots:
        yield from (module for module in root.modules() if isinstance(module, TransformerBlock))
