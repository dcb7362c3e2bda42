"""How much memory a device needs for a step: what is held all the time, and the moments when most is held besides.

A step holds most at one of three moments: at the end of the forward pass, with all activations and the loss's own
tensors; somewhere in the backward pass, when activations go and gradients come; or in the optimizer's step.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from opencoca.losses.captioning import CACHED_LOGITS, CHUNK_LOGITS, LEAST_CHUNK_WORDS
from opencoca.losses.contrastive import CHUNK_SIMILARITIES
from opencoca.model.coca import CoCa
from opencoca.plan.trace import Kept, Trace
from opencoca.train.optim.adafactor import Adafactor
from opencoca.train.optim.optimizer import parameter_groups
from opencoca.train.recipe.recipe import Recipe

Strategy = Literal["none", "ddp", "fsdp"]
# The share of memory that lies unused between tensors, or that an accelerator's libraries take.
GAP_SHARE = 0.08
STRATEGIES: tuple[Strategy, ...] = ("none", "ddp", "fsdp")


@dataclass(frozen=True)
class ModelBytes:
    """The bytes of the whole model, in float32.

    shared_weights: what FSDP gathers once for the whole step, which is all that is outside of blocks. largest_unit:
    the largest block; two blocks are gathered at a time. unit_gradients: the gradients of each unit of the trace.
    """

    weights: int
    trained: int
    optimizer: int
    average: int
    shared_weights: int
    largest_unit: int
    unit_gradients: dict[str, int]


@dataclass(frozen=True)
class StepShape:
    """What a device holds of a step.

    sub_images, sub_texts: those that go through the network at the same time; images, texts: those of its micro-batch;
    all_images, all_texts: those of the micro-batches of all devices. image_values: the numbers in an image.
    """

    sub_images: int
    sub_texts: int
    images: int
    texts: int
    all_images: int
    all_texts: int
    image_values: int
    embed_dim: int
    vocab_size: int
    text_width: int


@dataclass(frozen=True)
class Memory:
    """The bytes that one device needs; peak_bytes of them at the same time, at ``moment``, when they are most.

    activations: those of each part. logits: the chunk that the vocabulary loss works on, with its gradients. gathered:
    the embeddings of all devices and the similarities in work. inputs: the images. weight_copies: low-precision or
    gathered weights. working: what the largest block needs during its backward pass. process: the program itself, and
    on a CPU the gaps between tensors.
    """

    strategy: Strategy
    recompute: str
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: dict[str, int]
    weight_copies: int
    logits: int
    gathered: int
    inputs: int
    working: int
    process: int
    peak_bytes: int
    moment: str


def model_bytes(model: CoCa, recipe: Recipe) -> ModelBytes:
    """The bytes of a model that is trained with this recipe."""
    structure = model.structure()
    sizes = {name: 4 * parameter.numel() for name, parameter in model.named_parameters()}
    trained = {name: sizes[name] for name, p in model.named_parameters() if p.requires_grad}
    gathered = [{p for module in unit for p in module.parameters()} for unit in structure.shard_units()]
    in_blocks = sum(4 * parameter.numel() for parameter in set().union(*gathered))
    gradients: dict[str, int] = {}
    for name, size in trained.items():
        unit = structure.unit_of(name.rpartition(".")[0] or name).name
        gradients[unit] = gradients.get(unit, 0) + size
    return ModelBytes(
        weights=sum(sizes.values()) + sum(4 * buffer.numel() for buffer in model.buffers()),
        trained=sum(trained.values()),
        optimizer=_optimizer_bytes(model, recipe),
        average=sum(trained.values()) if recipe.optimizer.ema_decay else 0,
        shared_weights=sum(sizes.values()) - in_blocks,
        largest_unit=max((sum(4 * p.numel() for p in unit) for unit in gathered), default=0),
        unit_gradients=gradients,
    )


def _optimizer_bytes(model: CoCa, recipe: Recipe) -> int:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer.name == "adamw":
        return sum(8 * parameter.numel() for parameter in trained)
    if recipe.optimizer.name == "muon":
        hidden = model.structure().hidden_matrices()
        return sum((4 if parameter in hidden else 8) * parameter.numel() for parameter in trained)
    optimizer = Adafactor(parameter_groups(model, recipe), recipe.optimizer.learning_rate, recipe.optimizer.betas)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    for parameter in trained:
        parameter.grad = None
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Forecast:
    """What the memory of one device follows from; `memory` says how much it is.

    shards: how many devices share one copy of the model. recipe: of which recomputation and precision are taken.
    process_bytes: what the program itself takes.
    """

    trace: Trace
    model: ModelBytes
    shape: StepShape
    recipe: Recipe
    strategy: Strategy
    shards: int
    device_type: str
    process_bytes: int

    def memory(self) -> Memory:
        """The bytes of each kind, and the most of them that are held at the same time."""
        model, shards, recomputed = self.model, self.shards, self._recomputed()
        kept = {name: _stays(unit, name in recomputed) for name, unit in self.trace.units.items()}
        activations: dict[str, int] = {}
        for name, unit in self.trace.units.items():
            activations[unit.part] = activations.get(unit.part, 0) + kept[name]
        copies, gathered = self._weight_copies(), self._gathered()
        logits, head_grads = self._vocabulary_loss()
        inputs = 4 * self.shape.images * self.shape.image_values
        held = (model.weights + model.optimizer + model.average) // shards + inputs + self.process_bytes
        gradients, early = model.trained // shards, self._early_gradients()
        backward, working = self._backward_peak(kept, recomputed, early, head_grads)
        largest = max(model.unit_gradients.values(), default=0)
        moments = {
            "the end of the forward pass": held + early + sum(kept.values()) + copies + logits + gathered,
            "the backward pass": held + copies + backward,
            "the optimizer's step": held
            + gradients
            + (0 if self.recipe.optimizer.name == "adamw" else 3 * largest // shards),
        }
        moment = max(moments, key=lambda name: moments[name])
        gaps = int(GAP_SHARE * (moments[moment] - self.process_bytes)) if self.device_type == "cpu" else 0
        return Memory(
            strategy=self.strategy,
            recompute=self.recipe.compute.recompute,
            weights=model.weights // shards,
            gradients=max(gradients, early),
            optimizer=model.optimizer // shards,
            average=model.average // shards,
            activations=activations,
            weight_copies=copies,
            logits=logits,
            gathered=gathered,
            inputs=inputs,
            working=working,
            process=self.process_bytes + gaps,
            peak_bytes=moments[moment] + gaps,
            moment=moment,
        )

    def _recomputed(self) -> set[str]:
        """The units whose inside the recipe computes again."""
        options = self.recipe.compute
        wanted = ("image", "text") if options.recompute == "all" else (options.recompute,)
        blocks = [name for name, unit in self.trace.units.items() if unit.recomputable in wanted]
        return {name for number, name in enumerate(blocks) if (number + 1) % options.recompute_every == 0}

    def _early_gradients(self) -> int:
        """Gradients that are there as a whole before the last backward pass begins."""
        accumulates = self.recipe.accumulation_steps * self.recipe.grad_cache_steps > 1
        # With FSDP they are reduced in a step's last backward pass alone.
        return self.model.trained if self.strategy == "ddp" or accumulates else 0

    def _weight_copies(self) -> int:
        if self.shards == 1:
            return self.trace.weight_copy_bytes
        model, is_low = self.model, self.recipe.precision == "bf16"
        blocks = model.weights - model.shared_weights
        gathered = 2 * model.largest_unit if self.recipe.distributed.reshard_after_forward else blocks
        # What is outside of blocks is gathered in float32, and cast by autocast.
        return int((0.5 if is_low else 1.0) * gathered + (1.5 if is_low else 1.0) * model.shared_weights)

    def _vocabulary_loss(self) -> tuple[int, int]:
        """The bytes that the captioning loss holds, and those that stay until the head's gradient is made."""
        trace, shape = self.trace, self.shape
        if not self.recipe.task.uses.captioning or not trace.words:
            return 0, 0
        low = 2 if self.recipe.precision == "bf16" else 4
        chunk = min(trace.words, max(LEAST_CHUNK_WORDS, CHUNK_LOGITS // shape.vocab_size))
        wide = CACHED_LOGITS if self.device_type == "cpu" else chunk * shape.vocab_size
        hidden = trace.words * shape.text_width * low
        copy = 0 if trace.hidden_dtype.itemsize == low else hidden
        weights = shape.vocab_size * shape.text_width
        stays = hidden + copy + 4 * weights
        # The chunk's product with the head is as large as the gradient that it is added to.
        return chunk * shape.vocab_size * low + max(8 * wide, low * weights) + stays, stays

    def _gathered(self) -> int:
        shape = self.shape
        if not self.recipe.task.uses.contrastive:
            return 0
        embeds = 4 * shape.embed_dim * (shape.all_images + shape.all_texts)
        gradients = 4 * shape.embed_dim * (shape.images + shape.texts)
        chunk = min(CHUNK_SIMILARITIES, max(shape.images * shape.all_texts, shape.texts * shape.all_images))
        return embeds + gradients + 4 * 4 * chunk

    def _backward_peak(
        self, kept: dict[str, int], recomputed: set[str], early: int, head_grads: int
    ) -> tuple[int, int]:
        """The most that activations, gradients and a block's working tensors take together; and the latter alone."""
        remaining = sum(kept.values())
        # The vocabulary loss scales what it made in the forward pass, and then there are two of it.
        most, largest_working = remaining + early + 2 * head_grads, 0
        gradients = early or head_grads
        for name in reversed(self.trace.units):
            unit = self.trace.units[name]
            again = unit.kept_bytes if name in recomputed else 0
            # Of the unit's largest tensor: what its activation function made of it, the gradients before and behind it.
            working = again + 3 * unit.largest_bytes + unit.input_bytes
            own = self.model.unit_gradients.get(name, 0)
            most = max(most, remaining + gradients + working + own)
            largest_working = max(largest_working, working)
            remaining -= kept[name]
            if not early:
                gradients += own // self.shards
        return most, largest_working


def with_recompute(recipe: Recipe, kind: Literal["none", "image", "text", "all"]) -> Recipe:
    return replace(recipe, compute=replace(recipe.compute, recompute=kind, recompute_every=1))


def _stays(unit: Kept, is_recomputed: bool) -> int:
    return min(unit.input_bytes, unit.kept_bytes) if is_recomputed else unit.kept_bytes
