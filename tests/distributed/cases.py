"""Steps of a tiny model that any number of processes can take, each on its share of the same batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opencoca.data import Batch, EpochOrder
from opencoca.distributed.world import World, is_sharded, join_world
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, Compat, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.tasks import make_task
from opencoca.tasks.pretraining import PretrainingOptions
from opencoca.train.optim.optimizer import WeightAverage, build_optimizer
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe.recipe import DistributedRecipe, OptimizerRecipe, Recipe
from opencoca.train.step import NonFiniteLossError, TrainStep

BATCH_SIZE = 12
DECAY_OF_FIRST_UPDATE = 0.1


@dataclass(frozen=True)
class Case:
    """One step. images: of the batch, of BATCH_SIZE at most; ids: how many different images they are."""

    images: int = BATCH_SIZE
    different_images: int = 9
    captions_per_image: int = 2
    accumulation_steps: int = 1
    grad_cache_steps: int = 1
    contrastive_weight: float = 1.0
    caption_weight: float = 2.0
    reduction: str = "mean"
    grad_clip: float = 0.0
    tied: bool = False
    arrangement: str = "cascade"
    norm_image_tokens: bool = False
    frozen_stages: int = 0
    dropout: float = 0.0
    precision: str = "fp32"
    double: bool = False


CASES: dict[str, Case] = {
    "plain": Case(),
    "double": Case(double=True, grad_cache_steps=2),
    "clipped": Case(grad_clip=0.05),
    "accumulated": Case(accumulation_steps=3),
    "uneven": Case(images=7, different_images=7, accumulation_steps=2),
    "fewer images than ranks": Case(images=1, different_images=1, captions_per_image=3),
    "three images": Case(images=3, different_images=3),
    "cached": Case(grad_cache_steps=3),
    "cached and uneven": Case(images=5, different_images=4, grad_cache_steps=2),
    "cached and accumulated": Case(images=11, accumulation_steps=2, grad_cache_steps=2),
    "sums": Case(reduction="sum", accumulation_steps=2, grad_cache_steps=2),
    "contrastive alone": Case(caption_weight=0.0, arrangement="parallel", grad_cache_steps=2),
    "captioning alone": Case(contrastive_weight=0.0, grad_cache_steps=2),
    "tied, shared": Case(tied=True, arrangement="shared", norm_image_tokens=True),
    "frozen": Case(frozen_stages=2, grad_cache_steps=2),
    "bf16": Case(precision="bf16"),
}


def make_recipe(case: Case, strategy: str = "ddp", shard_size: int | None = None) -> Recipe:
    reduction: Any = case.reduction
    config = CoCaConfig(
        embed_dim=8,
        image=ImageEncoderConfig(
            image_size=(12, 12), patch_size=4, width=24, depth=2, num_heads=2, mlp_width=32, dropout=case.dropout
        ),
        pooler=PoolerConfig(
            arrangement=case.arrangement,  # pyright: ignore
            num_queries=5,
            num_heads=2,
            dropout=case.dropout,
        ),
        text=TextConfig(
            vocab_size=37,
            context_length=12,
            width=16,
            unimodal_depth=1,
            multimodal_depth=1,
            num_heads=4,
            mlp_width=24,
            tie_embeddings=case.tied,
            dropout=case.dropout,
        ),
        compat=Compat(text_norm_image_tokens=case.norm_image_tokens),
    )
    return Recipe(
        model=config,
        task=PretrainingOptions(
            contrastive_weight=case.contrastive_weight,
            caption_weight=case.caption_weight,
            label_smoothing=0.1,
            contrastive_reduction=reduction,
            caption_reduction=reduction,
            select_by="loss",
        ),
        optimizer=OptimizerRecipe(grad_clip=case.grad_clip, warmup_steps=0, ema_decay=0.9),
        distributed=DistributedRecipe(strategy=strategy, shard_size=shard_size),  # pyright: ignore
        batch_size=BATCH_SIZE,
        accumulation_steps=case.accumulation_steps,
        grad_cache_steps=case.grad_cache_steps,
        precision=case.precision,  # pyright: ignore
    )


def make_model(case: Case, recipe: Recipe) -> CoCa:
    torch.manual_seed(1)
    model = CoCa(recipe.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_logit_scale":
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.image_encoder.stages[: case.frozen_stages].requires_grad_(False)
    for parameter in make_task(recipe.task).unreached(model):
        parameter.requires_grad_(False)
    return model.double() if case.double else model


def make_batch(case: Case, world: World) -> Batch:
    """This process's share of one batch; image k of it shows what image k modulo the different ones does."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(BATCH_SIZE, 3, 12, 12, generator=generator)
    rows = BATCH_SIZE * case.captions_per_image
    token_ids = torch.randint(1, 37, (rows, 10), generator=generator)
    lengths = torch.randint(2, 11, (rows, 1), generator=generator)
    order = EpochOrder(case.images, 0, drop_last=False, micro_batches=case.accumulation_steps)
    share: dict[str, int] = {"rank": world.rank, "world_size": world.size}
    chosen = torch.from_numpy(order.batch(0, 0, BATCH_SIZE, **share))
    texts = (chosen[:, None] * case.captions_per_image + torch.arange(case.captions_per_image)).flatten()
    return Batch(
        sample_ids=chosen % case.different_images,
        images=(pixels.double() if case.double else pixels)[chosen],
        token_ids=token_ids[texts],
        token_mask=(torch.arange(10) < lengths)[texts],
        micro_batch_sizes=order.micro_batch_sizes(0, BATCH_SIZE, **share),
    )


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies each tensor in one piece; all processes that shard them must call.

    `full_tensor` gathers one tensor at a time, which takes longer than a tiny model's step.
    """
    parts = {name: tensor.detach().to_local().numpy() for name, tensor in tensors.items() if is_sharded(tensor)}
    if not parts:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    mesh = next(tensor.device_mesh for tensor in tensors.values() if is_sharded(tensor))
    group = mesh.get_group(mesh.ndim - 1)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, parts, group)
    return {
        name: torch.from_numpy(np.concatenate([held[name] for held in gathered]))
        if name in parts
        else tensor.detach().clone()
        for name, tensor in tensors.items()
    }


def take_step(case: Case, world: World, strategy: str = "none", shard_size: int | None = None) -> dict[str, Tensor]:
    """Losses, gradients, averages and parameters of one step, whole, by name; all processes must take it."""
    recipe = make_recipe(case, strategy, shard_size)
    model = make_model(case, recipe)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    parallel = ParallelModel(model, torch.device("cpu"), recipe, world)
    optimizer, average = build_optimizer(model, recipe), WeightAverage(model, 0.9)
    found: dict[str, Tensor] = {}

    def record(*_: object) -> None:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        have = {f"gradient/{name}": gradient for name, gradient in gradients.items() if gradient is not None}
        found.update(whole(have))

    optimizer.register_step_pre_hook(record)
    step = TrainStep(model, optimizer, average, recipe, parallel)
    metrics = step(make_batch(case, world), 0, 10)
    numbers = {"loss": metrics.loss, **metrics.terms, "grad_norm": metrics.grad_norm, "lr": metrics.lr}
    for name, value in (numbers | parallel.task.monitors(model)).items():
        found[f"metric/{name}"] = torch.tensor(value, dtype=torch.float64)
    found["metric/images"], found["metric/tokens"] = torch.tensor(metrics.samples), torch.tensor(metrics.tokens)
    found |= whole({f"average/{name}": tensor for name, tensor in average.state().items()})
    found |= whole({f"parameter/{name}": tensor for name, tensor in model.named_parameters()})
    found |= {f"before/{name}": tensor for name, tensor in before.items()}
    average.swap()
    gathered = parallel.gathered()
    if gathered is not None:
        found |= {f"gathered/{name}": tensor.detach().clone() for name, tensor in gathered.named_parameters()}
    return found


def take_bad_step(world: World, strategy: str, bad_rank: int) -> dict[str, Tensor]:
    """What changed in a step in which one process's images hold a NaN, and whether it was noticed here."""
    case = Case(grad_cache_steps=2)
    recipe = make_recipe(case, strategy)
    model = make_model(case, recipe)
    parallel = ParallelModel(model, torch.device("cpu"), recipe, world)
    optimizer = build_optimizer(model, recipe)
    step = TrainStep(model, optimizer, None, recipe, parallel)
    batch = make_batch(case, world)
    before = whole(dict(model.named_parameters()))
    assert batch.images is not None
    inputs = batch.images.clone()
    if world.rank == bad_rank:
        inputs[0, 0, 0, 0] = float("nan")
    noticed = False
    try:
        step(replace(batch, images=inputs), 0, 10)
    except NonFiniteLossError:
        noticed = True
    after = whole(dict(model.named_parameters()))
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    next_loss = step(batch, 1, 10).loss
    return {
        "noticed": torch.tensor(noticed),
        "changed": torch.tensor(len(changed)),
        "next": torch.tensor(next_loss),
    }


def take_cases(folder: Path, names: tuple[str, ...]) -> None:
    """Takes these steps as one of several processes, and writes what it found to files."""
    with join_world() as world:
        for name in names:
            strategy, _, case = name.partition(" ")
            strategy, _, shard_size = strategy.partition(":")
            if case.startswith("bad"):
                found = take_bad_step(world, strategy, world.size - 1)
            else:
                found = take_step(CASES[case], world, strategy, int(shard_size) if shard_size else None)
            torch.save(found, folder / f"{name} {world.rank}.pt")
