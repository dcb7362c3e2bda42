"""A recipe on so many devices: everything that can be said before the first step."""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opencoca.model.config import CoCaConfig
from opencoca.plan.communication import Exchange, exchanges
from opencoca.plan.memory import GAP_SHARE, Memory, StepShape, Strategy, with_recompute
from opencoca.plan.planner import Cluster, Planner, strategies_of
from opencoca.system.devices import (
    DEVICES,
    HOST_BUS_BYTES_PER_SEC,
    DeviceSpec,
    choose_precision,
    find_device,
    measured_flops,
)
from opencoca.train.flops import StepFlops
from opencoca.train.recipe.recipe import Recipe

# Of an accelerator's memory; the rest goes to its libraries and to gaps between tensors.
USABLE_SHARE = 1 - GAP_SHARE


@dataclass(frozen=True)
class Plan:
    """What a recipe needs.

    parameters: their number in each part. flops: the operations of a step on all devices together; recomputed_flops:
    those that are done a second time to save memory. memory: what one device needs with each strategy, with nothing
    and with all blocks recomputed; chosen: what it needs as the recipe says. remedy: what would make it fit, None if it
    fits. step_seconds: with all communication hidden behind work, and with none. steps: None if neither the recipe nor
    the number of images says.
    """

    model_name: str
    device: DeviceSpec
    cluster: Cluster
    strategy: Strategy
    shard_size: int
    shape: StepShape
    mean_words: float
    parameters: dict[str, int]
    trained_parameters: int
    flops: StepFlops
    recomputed_flops: float
    memory: list[Memory]
    chosen: Memory
    usable_bytes: int
    exchanges: list[Exchange]
    compute_seconds: float
    step_seconds: tuple[float, float]
    steps: int | None
    problems: list[str]
    remedy: str | None

    @property
    def fits(self) -> bool:
        return self.chosen.peak_bytes <= self.usable_bytes

    @property
    def days(self) -> tuple[float, float] | None:
        """How long all steps take: at best, and at worst."""
        if self.steps is None:
            return None
        low, high = (self.steps * seconds / 86_400 for seconds in self.step_seconds)
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan in JSON's types."""
        values = asdict(self)
        values["flops"] = self.flops._asdict() | {"total": self.flops.total}
        return values | {"fits": self.fits, "days": self.days}


def make_plan(
    recipe: Recipe,
    cluster: Cluster,
    *,
    mean_words: float = 16.0,
    num_images: int | None = None,
    lengths: Tensor | None = None,
) -> Plan:
    """Works out what the recipe needs on these devices.

    mean_words: the mean number of token ids in a text; lengths: instead, the lengths of one device's texts.
    num_images: the number of images in an epoch.

    Raises ValueError for a device that is not known, and for sizes that do not fit one another.
    """
    spec = _device(cluster)
    device = torch.device("cpu") if cluster.device == "cpu" else spec
    recipe = replace(recipe, precision=choose_precision(recipe.precision, device))
    _check(recipe, cluster)
    planner = Planner(recipe, cluster, mean_words, lengths)
    strategy: Strategy = recipe.distributed.strategy if cluster.devices > 1 else "none"
    chosen = planner.memory(recipe, strategy)
    table = [
        planner.memory(with_recompute(recipe, kind), each)
        for each in strategies_of(recipe, cluster)
        for kind in ("none", "all")
    ]
    flops = planner.flops()
    again = planner.recomputed_flops(flops)
    link = cluster.link_bytes_per_sec or spec.link_bytes_per_sec or HOST_BUS_BYTES_PER_SEC
    messages = exchanges(planner, strategy, link)
    compute = (flops.total + again) / (cluster.devices * spec.peak(recipe.precision) * cluster.utilisation)
    talk = sum(message.seconds for message in messages)
    usable = int(spec.memory_bytes * USABLE_SHARE)
    fits = chosen.peak_bytes <= usable
    return Plan(
        model_name=_name(recipe),
        device=spec,
        cluster=cluster,
        strategy=strategy,
        shard_size=planner.shard_size if strategy == "fsdp" else 1,
        shape=planner.shape(recipe),
        mean_words=float(planner.lengths.double().mean()),
        parameters=planner.parameters(),
        trained_parameters=planner.model.trained // 4,
        flops=flops,
        recomputed_flops=again,
        memory=table,
        chosen=chosen,
        usable_bytes=usable,
        exchanges=messages,
        compute_seconds=compute,
        step_seconds=(max(compute, talk), compute + talk),
        steps=_steps(recipe, num_images),
        problems=[] if fits else [_too_large(chosen, usable, spec)],
        remedy=None if fits else planner.remedy(usable),
    )


def _too_large(memory: Memory, usable: int, spec: DeviceSpec) -> str:
    return (
        f"a step needs {memory.peak_bytes / 2**30:.1f} GiB at {memory.moment}, and {usable / 2**30:.1f} GiB of "
        f"{spec.name}'s {spec.memory_bytes / 2**30:.1f} are usable"
    )


def _device(cluster: Cluster) -> DeviceSpec:
    if cluster.device != "cpu":
        spec = find_device(cluster.device)
        if spec is None:
            raise ValueError(f"--device {cluster.device} is not known; known: cpu, {', '.join(DEVICES)}")
        return spec
    if cluster.devices > 1:
        raise ValueError("a plan for CPUs is for one process; take --devices 1")
    rates = {kind: measured_flops(torch.device("cpu"), kind) for kind in ("bf16", "fp32")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceSpec("this machine's CPU", rates["bf16"], rates["fp32"], memory, None, "measured now")


def _check(recipe: Recipe, cluster: Cluster) -> None:
    parts = cluster.devices * recipe.accumulation_steps
    if recipe.batch_size % parts:
        raise ValueError(
            f"batch_size {recipe.batch_size} must be a multiple of --devices {cluster.devices} x accumulation_steps "
            f"{recipe.accumulation_steps}"
        )
    if cluster.devices > 1 and recipe.distributed.strategy == "none":
        raise ValueError("distributed.strategy none is for one device; set it to ddp or fsdp")
    shard_size = recipe.distributed.shard_size or 1
    if recipe.distributed.strategy == "fsdp" and cluster.devices % shard_size:
        raise ValueError(f"distributed.shard_size {shard_size} must divide --devices {cluster.devices}")


def _name(recipe: Recipe) -> str:
    """The size's name, if the architecture is unchanged."""
    named = CoCaConfig.named(recipe.size)
    is_same = replace(recipe.model, text=replace(recipe.model.text, vocab_size=named.text.vocab_size)) == named
    return recipe.size if is_same else f"a model of {recipe.model.image.name} and width {recipe.model.text.width}"


def _steps(recipe: Recipe, num_images: int | None) -> int | None:
    steps = None if num_images is None else recipe.epochs * max(1, num_images // recipe.batch_size)
    limits = [count for count in (steps, recipe.max_steps) if count is not None]
    return min(limits) if limits else None
