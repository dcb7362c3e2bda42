"""What a training run is: one recipe file, and the options that override it.

A recipe is YAML whose keys are the fields below; ``--section.key value`` on the command line overrides it, and unknown
keys fail. ``model`` changes the architecture of the model that ``init_from`` names, or else of the size that ``size``
names; the vocabulary size comes from the tokenizer. `load_recipe` reads a recipe.
"""

import math
import sys
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any, Literal

from opencoca.model.config import CoCaConfig
from opencoca.system.messages import shown
from opencoca.tasks import TaskOptions
from opencoca.tasks.pretraining import PretrainingOptions
from opencoca.tokenizer.languages import check_languages
from opencoca.train.recipe.data import DataRecipe
from opencoca.train.recipe.optimizer import SHARDABLE, ComputeRecipe, OptimizerRecipe
from opencoca.train.recipe.safety import CheckpointRecipe, SafetyRecipe


@dataclass(frozen=True)
class TokenizerRecipe:
    """The vocabulary.

    Args:
        source: clip, train (on the training captions), init_from (the start model's), or the path of a tokenizer.json.
        vocab_size: of a trained vocabulary, at most.
        min_frequency: how often a pair must be seen to be merged, when training.
        lowercase: when training.
        strip_final_period: when training.
        languages: when training: those that captions are in, such as [en, zh], the default first; each gets a token.
    """

    source: str = "clip"
    vocab_size: int = 8000
    min_frequency: int = 2
    lowercase: bool = True
    strip_final_period: bool = True
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncoderRecipe:
    """What happens to the image encoder.

    Args:
        init: none (random), imagenet (EfficientNet-Lite), or a model folder whose image encoder is taken.
        frozen_stages: how many of its first stages are not trained; -1 = all.
        learning_rate: of what is trained of it; None = as the rest.
        cache_features: compute the frozen stages once, of cache_views views an image, and train on what was stored.
        cache_views: stored views of a training image: as it is, mirrored, and random crops.
        cache_dir: where stored features live; None = inside the run's folder.
        patch_dropout: of a vit: this part of an image's patches is left out in training (FLIP, arXiv 2212.00794).
    """

    init: str = "none"
    frozen_stages: int = 0
    learning_rate: float | None = None
    cache_features: bool = False
    cache_views: int = 2
    cache_dir: str | None = None
    patch_dropout: float = 0.0


@dataclass(frozen=True)
class InitRecipe:
    """The whole pretrained model that training starts from; ``init_from: NAME`` in a recipe is short for its model.

    Architecture, tokenizer and preprocessing come from it unless the recipe says otherwise. Where shapes differ, image
    positions are interpolated, and what cannot be taken starts anew; the log says what.

    Args:
        model: what `opencoca.load` takes: a shipped or published name, a folder, a run, hf-hub:ORGANISATION/NAME, or
            open_clip:NAME with checkpoint; None = training starts from random values.
        weights: which weights of a published name.
        checkpoint: file with the weights for open_clip:NAME.
    """

    model: str | None = None
    weights: str | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.model is None and (self.weights or self.checkpoint):
            raise ValueError("init_from.weights and init_from.checkpoint need init_from.model")


@dataclass(frozen=True)
class DistributedRecipe:
    """How several processes (``torchrun -m opencoca train RECIPE``) train one model; one process alone ignores it.

    Args:
        strategy: ddp (each has all weights), fsdp (weights, gradients and optimizer state are sharded, block by
            block), or none (several processes are an error).
        shard_size: with fsdp, how many processes share one copy of the weights, such as those of one machine (hybrid
            sharding); None = all.
        reshard_after_forward: with fsdp, frees a block's weights between forward and backward, and gathers them again.
        timeout_minutes: how long a process waits for another in the middle of a step.
    """

    strategy: Literal["none", "ddp", "fsdp"] = "ddp"
    shard_size: int | None = None
    reshard_after_forward: bool = True
    timeout_minutes: float = 10.0


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        output: folder of the run: best model, last checkpoint, metrics, report.
        task: what is trained and how it is scored: pretraining, and its options.
        init_from: the pretrained model that training starts from.
        size: named model size that ``model`` changes, without init_from.
        model: the architecture.
        data: images and captions.
        tokenizer: vocabulary.
        encoder: image encoder: start, freezing, caching.
        optimizer: optimizer, schedule, and what is frozen.
        compute: recomputing and compiling of blocks.
        distributed: several processes.
        checkpoint: stored states of the run.
        safety: what happens when a step goes wrong.
        epochs: passes over the training images.
        max_steps: stops earlier, after so many steps.
        batch_size: images a step, over all processes.
        accumulation_steps: micro-batches that a step is made of; contrastive negatives are those of a micro-batch.
        grad_cache_steps: sub-batches in which a micro-batch goes through the network (GradCache, arXiv 2101.06983);
            contrastive negatives are still those of the whole micro-batch, for one more forward pass of its images
            and texts.
        precision: fp32, bf16 (autocast), or auto: bf16 on a device with instructions for it, fp32 on others. A run
            keeps the one that it began with.
        device: auto, cpu, or cuda.
        seed: of everything random.
        validate_every_epochs: how often the validation set is scored.
        checkpoint_minutes: how often a checkpoint is written, besides every validation.
        log_every_steps: how often metrics are written.
        report_images: validation photographs whose captions are logged at every validation and shown in the report.
        tensorboard: also write TensorBoard events (extra: tensorboard).
    """

    output: str = "runs/coca"
    task: TaskOptions = field(default_factory=PretrainingOptions)
    init_from: InitRecipe = field(default_factory=InitRecipe)
    size: str = "small"
    model: CoCaConfig = field(default_factory=lambda: CoCaConfig.named("small"))
    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    encoder: EncoderRecipe = field(default_factory=EncoderRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    compute: ComputeRecipe = field(default_factory=ComputeRecipe)
    distributed: DistributedRecipe = field(default_factory=DistributedRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    safety: SafetyRecipe = field(default_factory=SafetyRecipe)
    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 64
    accumulation_steps: int = 1
    grad_cache_steps: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    seed: int = 0
    validate_every_epochs: int = 1
    checkpoint_minutes: float = 10.0
    log_every_steps: int = 10
    report_images: int = 8
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.batch_size % self.accumulation_steps:
            raise ValueError(f"accumulation_steps {self.accumulation_steps} must divide batch_size {self.batch_size}")
        if self.grad_cache_steps > self.batch_size:
            raise ValueError(f"grad_cache_steps {self.grad_cache_steps} is more than batch_size {self.batch_size}")
        if not self.output.strip() or "\0" in self.output:
            raise ValueError(f"output {shown(self.output)} must name a folder")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self.data, name)
            if not 0 < low <= high or (name == "crop_scale" and high > 1):
                bound = " and at most 1" if name == "crop_scale" else ""
                raise ValueError(f"data.{name} {low} to {high} must be a range above 0{bound}")
        if self.encoder.cache_features and self.encoder.frozen_stages == 0:
            raise ValueError("encoder.cache_features needs frozen stages: set encoder.frozen_stages (-1 = all)")
        if self.tokenizer.source == "init_from" and self.init_from.model is None:
            raise ValueError("tokenizer.source is init_from, but init_from names no model")
        if self.tokenizer.languages and self.tokenizer.source != "train":
            raise ValueError(f"tokenizer.languages are for tokenizer.source train, not {shown(self.tokenizer.source)}")
        check_languages(self.tokenizer.languages)
        name = self.optimizer.name
        if name not in SHARDABLE and self.distributed.strategy == "fsdp":
            raise ValueError(f"optimizer.name {name} does not work with distributed.strategy fsdp; use adamw or ddp")
        if self.distributed.strategy == "fsdp":
            linear = self.model.linear.dim and self.task.uses.contrastive
            used = {"task.reward_weight": getattr(self.task, "reward_weight", 0), "model.linear.dim": linear}
            for key in (key for key, value in used.items() if value):
                raise ValueError(f"{key} does not work with distributed.strategy fsdp; use ddp, or set it to 0")
        if self.encoder.learning_rate is not None and "image_encoder" in self.optimizer.learning_rates:
            raise ValueError("encoder.learning_rate and optimizer.learning_rates both set that of the image encoder")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# What numbers may be: (least, most), both included; _NEXT is the least float above 0. The most is ten times what the
# paper's largest model was trained with, or more: what lies beyond is a slip that takes time or memory without end.
_NEXT = math.ulp(0.0)
_BELOW_ONE = math.nextafter(1.0, 0.0)
_LARGEST = sys.float_info.max
_RANGES: dict[tuple[float, float], str] = {
    (1, 10**9): "max_steps log_every_steps checkpoint.every_steps checkpoint.keep_every_steps tokenizer.min_frequency",
    (1, 10**6): """
        epochs batch_size accumulation_steps grad_cache_steps validate_every_epochs data.shuffle_window
        distributed.shard_size checkpoint.keep_last tokenizer.vocab_size
        """,
    (1, 1024): "data.captions_per_image encoder.cache_views compute.recompute_every",
    (0, 10_000): "report_images",
    (1, 10**12): "data.max_pixels",
    (0, 1024): "data.num_workers",
    (0, 10**6): "checkpoint_minutes safety.hang_minutes safety.non_finite_limit",
    (0, 10**9): "optimizer.warmup_steps",
    (0, 2**64 - 1): "seed",
    (0, _LARGEST): "optimizer.weight_decay optimizer.grad_clip safety.spike_deviations",
    (_NEXT, 10**6): "distributed.timeout_minutes data.cache_gb",
    (_NEXT, _LARGEST): "encoder.learning_rate optimizer.learning_rate optimizer.eps",
    (0, 1): """
        data.flip_probability data.color_jitter data.max_bad_share optimizer.decay_fraction optimizer.final_lr_fraction
        """,
    (_NEXT, 1): "optimizer.layer_decay",
    (0, _BELOW_ONE): "encoder.patch_dropout optimizer.ema_decay",
    (-1, 1024): "encoder.frozen_stages",
}


def _check_ranges(recipe: Recipe) -> None:
    for name, (least, most) in ((name, bounds) for bounds, names in _RANGES.items() for name in names.split()):
        value = attrgetter(name)(recipe)
        if value is not None and not least <= value <= most:  # also if it is not a number
            low = "more than 0" if least == _NEXT else f"at least {least:,}"
            high = {_LARGEST: "", _BELOW_ONE: " and less than 1"}.get(most, f" and at most {most:,}")
            raise ValueError(f"{name} {shown(value)} must be {low}{high}")
    for beta in recipe.optimizer.betas:
        if not 0 <= beta < 1:
            raise ValueError(f"optimizer.betas {recipe.optimizer.betas} must be at least 0 and less than 1")
