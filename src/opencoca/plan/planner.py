"""One recipe's model without values, and what it needs, also with some of the recipe's keys changed."""

from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from opencoca.data import Batch
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.model.init import without_values
from opencoca.model.structure import PARTS
from opencoca.plan.memory import (
    STRATEGIES,
    Forecast,
    Memory,
    ModelBytes,
    StepShape,
    Strategy,
    model_bytes,
    with_recompute,
)
from opencoca.plan.trace import Trace, trace_forward
from opencoca.system.memory_use import resident_bytes
from opencoca.tasks import make_task
from opencoca.tokenizer import Tokenizer
from opencoca.train.data_sources import open_train_source
from opencoca.train.flops import ModelFlops, StepFlops, compared_width
from opencoca.train.optim.optimizer import freeze
from opencoca.train.recipe.optimizer import SHARDABLE
from opencoca.train.recipe.recipe import Recipe

# Of a process on a CPU: kernels made for the shapes it meets, threads, gaps between tensors (results/plan_memory.md).
_KERNEL_BYTES = 160 << 20
_CLIP_VOCABULARY = 49_408
# Standard deviation over mean of Flickr8k's captions, in words of the CLIP vocabulary.
_SPREAD = 0.3
_LEAST_WORDS = 3


@dataclass(frozen=True)
class Cluster:
    """Where a recipe is to run.

    device: the name of a device in `opencoca.system.devices.DEVICES`, or cpu for this machine's. utilisation: the
    share of the peak rate that steps are expected to reach. network_bytes_per_sec: the rate from one device to those of
    other machines, in one direction; link_bytes_per_sec: to those of its own, if it is not the device's usual one.
    """

    devices: int = 1
    device: str = "cpu"
    devices_per_node: int = 8
    utilisation: float = 0.45
    network_bytes_per_sec: float = 50e9
    link_bytes_per_sec: float | None = None


def vocabulary_size(recipe: Recipe) -> int:
    """The vocabulary size of the recipe's tokenizer, or the largest possible one if it is yet to be trained."""
    source = recipe.tokenizer.source
    if source == "clip":
        return _CLIP_VOCABULARY
    if source == "init_from":
        return recipe.model.text.vocab_size  # the start model's, as `load_recipe` filled it in
    return recipe.tokenizer.vocab_size if source == "train" else Tokenizer.load(source).vocab_size


def strategies_of(recipe: Recipe, cluster: Cluster) -> tuple[Strategy, ...]:
    """The strategies that the recipe could use on these devices."""
    if cluster.devices == 1:
        return ("none",)
    return STRATEGIES if recipe.optimizer.name in SHARDABLE else STRATEGIES[:2]


def likely_lengths(num_texts: int, mean_words: float, context_length: int) -> Tensor:
    """Lengths (B,) with this mean, spread like those of captions: evenly spaced quantiles of a normal distribution.

    Raises ValueError if the mean is not between 3 and context_length.
    """
    if not _LEAST_WORDS <= mean_words <= context_length:
        raise ValueError(
            f"--words {mean_words:g} must be from {_LEAST_WORDS} to the model's context_length, {context_length}"
        )
    normal = NormalDist(mean_words, _SPREAD * mean_words)
    quantiles = [normal.inv_cdf((i + 0.5) / num_texts) for i in range(num_texts)]
    return torch.tensor(quantiles).round().long().clamp(_LEAST_WORDS, context_length)


def batch_of(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Makes token_ids (B, T) and token_mask (B, T) of texts with these lengths; the ids mean nothing."""
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    return torch.zeros(mask.shape, dtype=torch.int64), mask


class Planner:
    """The recipe's model without values, and forecasts for variants of the recipe."""

    def __init__(self, recipe: Recipe, cluster: Cluster, mean_words: float, lengths: Tensor | None):
        self.recipe, self.cluster = recipe, cluster
        self.device_type = "cpu" if cluster.device == "cpu" else "cuda"
        text = replace(recipe.model.text, vocab_size=vocabulary_size(recipe))
        self.task = make_task(recipe.task, open_train_source(recipe) if recipe.task.needs_samples else None)
        self.config: CoCaConfig = self.task.configure(replace(recipe.model, text=text))
        with without_values():
            self.network = CoCa(self.config)
        self.frozen_stages = freeze(self.network, recipe, self.task)
        self.network.set_patch_dropout(recipe.encoder.patch_dropout)
        self.network.train()
        self.model: ModelBytes = model_bytes(self.network, recipe)
        per_image = recipe.data.captions_per_image
        local = recipe.batch_size // cluster.devices // recipe.accumulation_steps
        if lengths is None:
            lengths = likely_lengths(local * per_image, mean_words, text.context_length)
        self.lengths = lengths
        self.shard_size = recipe.distributed.shard_size or cluster.devices
        self.process_bytes = resident_bytes() + _KERNEL_BYTES if self.device_type == "cpu" else 0
        self._traces: dict[int, Trace] = {}

    def shape(self, recipe: Recipe) -> StepShape:
        per_image = recipe.data.captions_per_image
        images = recipe.batch_size // self.cluster.devices // recipe.accumulation_steps
        sub = -(-images // recipe.grad_cache_steps)
        height, width = self.config.image.image_size
        return StepShape(
            sub_images=sub,
            sub_texts=sub * per_image,
            images=images,
            texts=images * per_image,
            all_images=images * self.cluster.devices,
            all_texts=images * self.cluster.devices * per_image,
            image_values=3 * height * width,
            embed_dim=compared_width(self.config, self.recipe.task.uses),
            vocab_size=self.config.text.vocab_size,
            text_width=self.config.text.width,
        )

    def memory(self, recipe: Recipe, strategy: Strategy) -> Memory:
        shape = self.shape(recipe)
        trace = self._trace(shape.sub_images, shape.sub_texts)
        shards = self.shard_size if strategy == "fsdp" else 1
        return Forecast(
            trace, self.model, shape, recipe, strategy, shards, self.device_type, self.process_bytes
        ).memory()

    def _trace(self, images: int, texts: int) -> Trace:
        if images not in self._traces:
            # A part of the batch has texts whose lengths are spread like those of all.
            every = torch.linspace(0, len(self.lengths) - 1, texts).round().long()
            ids, mask = batch_of(self.lengths[every])
            if not self.task.reads_texts:
                ids, mask = ids[:0], mask[:0]
            start = self.frozen_stages if self.recipe.encoder.cache_features else 0
            self._traces[images] = trace_forward(
                self.network,
                self.task,
                Batch(torch.arange(images), None, ids, mask, from_stage=start),
                device_type=self.device_type,
                precision=self.recipe.precision,
            )
        return self._traces[images]

    def flops(self) -> StepFlops:
        """The operations of a step on all devices together."""
        shape = self.shape(self.recipe)
        count = ModelFlops(self.config, self.recipe, self.task)
        one = count(shape.images, self.lengths if self.task.reads_texts else (), all_texts=shape.all_texts)
        factor = self.cluster.devices * self.recipe.accumulation_steps
        return StepFlops(*(factor * value for value in one))

    def recomputed_flops(self, flops: StepFlops) -> float:
        """The operations of forward passes that are done twice: recomputed blocks, and GradCache's first pass."""
        recipe = self.recipe
        options, third = recipe.compute, 1 / 3
        again = 0.0
        if options.recompute in ("image", "all"):
            again += third * flops.image_encoder / options.recompute_every
        if options.recompute in ("text", "all"):
            again += third * (flops.unimodal + flops.multimodal) / options.recompute_every
        if recipe.grad_cache_steps > 1 and recipe.task.uses.contrastive:
            again += third * (flops.image_encoder + flops.poolers + flops.unimodal)
        return again

    def parameters(self) -> dict[str, int]:
        structure = self.network.structure()
        count = {part: sum(p.numel() for p in structure.parameters(part)) for part in PARTS}
        heads = count.pop("heads")
        if self.config.head is None:
            del count["task_head"]
        if not self.config.linear.dim:
            del count["linear_branch"]
        count["vocabulary head"] = 0 if self.config.text.tie_embeddings else self.network.vocab_weight.numel()
        count["projections, temperature"] = heads - count["vocabulary head"]
        return count

    def remedy(self, usable: int) -> str:
        """The cheapest change of the recipe that makes it fit, in words."""
        several = self.cluster.devices > 1
        own: Strategy = self.recipe.distributed.strategy if several else "none"
        others = strategies_of(self.recipe, self.cluster)
        strategies: list[Strategy] = [own, "fsdp"] if "fsdp" in others and own != "fsdp" else [own]
        images = self.shape(self.recipe).images
        for sub_batches in (2**k for k in range(11)):
            if sub_batches < self.recipe.grad_cache_steps or sub_batches > max(1, images):
                continue
            for kind in (self.recipe.compute.recompute, "text", "image", "all"):
                for strategy in strategies:
                    changed = replace(with_recompute(self.recipe, kind), grad_cache_steps=sub_batches)
                    memory = self.memory(changed, strategy)
                    if memory.peak_bytes <= usable:
                        return _in_words(self.recipe, own, strategy, kind, sub_batches, memory)
        least = (
            "more of them, with distributed.strategy fsdp (optimizer.name adamw)"
            if several
            else "several devices with fsdp (--devices)"
        )
        return f"nothing makes it fit {self.cluster.devices} of them; take {least}, or devices with more memory"


def _in_words(recipe: Recipe, own: Strategy, strategy: Strategy, kind: str, sub_batches: int, memory: Memory) -> str:
    changes = []
    if strategy != own:
        changes.append(f"distributed.strategy: {strategy}")
    if kind != recipe.compute.recompute:
        changes.append(f"compute.recompute: {kind}")
    if sub_batches != recipe.grad_cache_steps:
        changes.append(f"grad_cache_steps: {sub_batches}")
    return f"{', '.join(changes)} needs {memory.peak_bytes / 2**30:.1f} GiB"
