"""What each of several processes holds and computes of a run's beginning, its validation and its loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opencoca.distributed.world import World, full_tensor, join_world, local_part
from opencoca.losses import contrastive_loss
from opencoca.model.coca import CoCa
from opencoca.train import Recipe, load_recipe
from opencoca.train.parallel import ParallelModel
from opencoca.train.trainer import Trainer
from opencoca.train.validation import shared_scores

ROWS, EMBED_DIM, CHUNK_ROWS = 256, 6, 4


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def begin(recipe: Recipe, world: World) -> dict[str, Any]:
    """A run that has taken no step: its weights, what this process holds of them, and their validation scores."""
    before_sharding = 0

    def note_what_is_held(model: CoCa, *args: Any) -> ParallelModel:
        nonlocal before_sharding
        before_sharding = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
        return ParallelModel(model, *args)

    with patch("opencoca.train.trainer.ParallelModel", note_what_is_held):
        trainer = Trainer(recipe, world)
    parameters = dict(trainer.model.named_parameters())
    model = trainer.parallel.gathered(everywhere=True)
    assert model is not None
    assert trainer.validator is not None
    part = trainer.validator.part(model, world.rank, world.size)
    scores = shared_scores(trainer.validator, model, world, lambda work: work())
    gives_up = world.rank == world.size - 1
    given_up = shared_scores(trainer.validator, model, world, lambda work: None if gives_up else work())
    return {
        "weights": {name: full_tensor(parameter.detach()).clone() for name, parameter in parameters.items()},
        "elements_before_sharding": before_sharding,
        "elements": sum(local_part(parameter).numel() for parameter in parameters.values()),
        "validated_images": sum(count for count, _ in part.rows[0]),
        "scores": scores and scores.values,
        "captions": scores and scores.texts,
        "given_up": given_up is None,
    }


def largest_of_the_loss(world: World) -> int:
    """Elements of the largest tensor that the contrastive loss makes in this process, of ROWS images of all."""
    own = ROWS // world.size
    images, texts = (F.normalize(torch.randn(own, EMBED_DIM), dim=1).requires_grad_() for _ in range(2))
    ids = torch.arange(own) + own * world.rank
    with LargestTensor() as largest:
        contrastive_loss(images, texts, 5.0, ids, ids, chunk_rows=CHUNK_ROWS, world=world).backward()
    return largest.elements


def take_shares(folder: Path, recipe: Path, strategies: tuple[str, ...]) -> None:
    """Does its part as one of several processes, and writes what it found to files."""
    with join_world() as world:
        for strategy in strategies:
            loaded = load_recipe(recipe, ["--distributed.strategy", strategy])
            found = begin(replace(loaded, output=f"{loaded.output}-{strategy}"), world)
            torch.save(found, folder / f"{strategy} {world.rank}.pt")
        torch.save(largest_of_the_loss(world), folder / f"loss {world.rank}.pt")
