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
# Of the tensors' memory, what lies unused between them; of an accelerator's, what is not usable because of it and more.
GAP_SHARE = 0.08
STRATEGIES: tuple[Strategy, ...] = ("none", "ddp", "fsdp")


@dataclass(frozen=True)
class ModelBytes:
    """Sizes of the whole model, in float32 unless said otherwise.

    shared_weights: what FSDP gathers once for the whole step: all that is outside of blocks. largest_unit: the largest
    of the blocks, of which two are gathered at a time. unit_gradients: of what is trained, by unit of the trace.
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

    sub_images, sub_texts: of the sub-batch that goes through the network at a time; images, texts: of its micro-batch;
    all_images, all_texts: of the micro-batches of all devices.
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
    """Bytes on one device. activations: by part; peak_bytes: at the worst moment, whose name is ``moment``.

    logits: of the chunk that the vocabulary loss works on, with its gradients. gathered: embeddings of all devices and
    the similarities in work. inputs: images. weight_copies: low-precision or gathered weights. working: the largest
    block's tensors of the backward pass. process: the program itself, and gaps between tensors (on a CPU).
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


def forecast_memory(
    trace: Trace,
    model: ModelBytes,
    shape: StepShape,
    recipe: Recipe,
    strategy: Strategy,
    shard_size: int,
    device_type: str,
    process_bytes: int,
) -> Memory:
    """shard_size: how many devices share one copy with fsdp. recipe: of which recompute and precision are taken."""
    shards = shard_size if strategy == "fsdp" else 1
    chosen = _recomputed(trace, recipe)
    kept = {name: _stays(unit, name in chosen) for name, unit in trace.units.items()}
    activations: dict[str, int] = {}
    for name, unit in trace.units.items():
        activations[unit.part] = activations.get(unit.part, 0) + kept[name]
    copies = _weight_copies(trace, model, recipe, strategy, shards)
    logits, head_grads = _vocabulary_loss(trace, shape, recipe, device_type)
    gathered = _gathered(shape, recipe, device_type)
    inputs = 4 * shape.images * shape.image_values
    held = (model.weights + model.optimizer + model.average) // shards + inputs + process_bytes
    gradients = model.trained // shards
    accumulates = recipe.accumulation_steps * recipe.grad_cache_steps > 1
    early = gradients if strategy == "ddp" or (accumulates and strategy == "none") else 0
    if strategy == "fsdp" and accumulates:
        early = model.trained  # they are reduced in a step's last backward pass alone
    total_kept = sum(kept.values())
    forward_end = held + early + total_kept + copies + logits + gathered
    backward, working = _backward_peak(trace, kept, model, shards, early, head_grads, chosen)
    update = held + gradients + (0 if recipe.optimizer.name == "adamw" else 3 * _largest(model) // shards)
    moments = {
        "the end of the forward pass": forward_end,
        "the backward pass": held + copies + backward,
        "the optimizer's step": update,
    }
    moment = max(moments, key=lambda name: moments[name])
    gaps = int(GAP_SHARE * (moments[moment] - process_bytes)) if device_type == "cpu" else 0
    return Memory(
        strategy=strategy,
        recompute=recipe.compute.recompute,
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
        process=process_bytes + gaps,
        peak_bytes=moments[moment] + gaps,
        moment=moment,
    )


def with_recompute(recipe: Recipe, kind: Literal["none", "image", "text", "all"]) -> Recipe:
    return replace(recipe, compute=replace(recipe.compute, recompute=kind, recompute_every=1))


def _recomputed(trace: Trace, recipe: Recipe) -> set[str]:
    """The units whose inside the recipe computes again."""
    options = recipe.compute
    wanted = ("image", "text") if options.recompute == "all" else (options.recompute,)
    blocks = [name for name, unit in trace.units.items() if unit.recomputable in wanted]
    return {name for number, name in enumerate(blocks) if (number + 1) % options.recompute_every == 0}


def _stays(unit: Kept, is_recomputed: bool) -> int:
    return min(unit.input_bytes, unit.kept_bytes) if is_recomputed else unit.kept_bytes


def _weight_copies(trace: Trace, model: ModelBytes, recipe: Recipe, strategy: Strategy, shards: int) -> int:
    if strategy != "fsdp" or shards == 1:
        return trace.weight_copy_bytes
    part = 0.5 if recipe.precision == "bf16" else 1.0
    blocks = model.weights - model.shared_weights
    gathered = 2 * model.largest_unit if recipe.distributed.reshard_after_forward else blocks
    # What is outside of blocks is gathered in float32, and cast by autocast.
    shared = model.shared_weights * (1.5 if recipe.precision == "bf16" else 1.0)
    return int(part * gathered + shared)


def _vocabulary_loss(trace: Trace, shape: StepShape, recipe: Recipe, device_type: str) -> tuple[int, int]:
    """Bytes of all that the captioning loss holds, and of the part that stays until the head's gradient is there."""
    if not recipe.task.uses.captioning or not trace.words:
        return 0, 0
    low = 2 if recipe.precision == "bf16" else 4
    chunk = min(trace.words, max(LEAST_CHUNK_WORDS, CHUNK_LOGITS // shape.vocab_size))
    wide = CACHED_LOGITS if device_type == "cpu" else chunk * shape.vocab_size
    hidden = trace.words * shape.text_width * low
    copy = 0 if trace.hidden_dtype.itemsize == low else hidden
    weight_grad = shape.vocab_size * shape.text_width * 4
    # The chunk's product with the head is as large as the gradient that it is added to.
    product = shape.vocab_size * shape.text_width * low
    stays = hidden + copy + weight_grad
    return chunk * shape.vocab_size * low + max(8 * wide, product) + stays, stays


def _gathered(shape: StepShape, recipe: Recipe, device_type: str) -> int:
    if not recipe.task.uses.contrastive:
        return 0
    embeds = 4 * shape.embed_dim * (shape.all_images + shape.all_texts)
    gradients = 4 * shape.embed_dim * (shape.images + shape.texts)
    chunk = min(CHUNK_SIMILARITIES, max(shape.images * shape.all_texts, shape.texts * shape.all_images))
    return embeds + gradients + 4 * 4 * chunk


def _backward_peak(
    trace: Trace,
    kept: dict[str, int],
    model: ModelBytes,
    shards: int,
    early: int,
    head_grads: int,
    chosen: set[str],
) -> tuple[int, int]:
    """The most that activations, gradients and a block's working tensors take together; and the latter alone."""
    remaining = sum(kept.values())
    # The vocabulary loss scales what it made in the forward pass, and then there are two of it.
    most, largest_working = remaining + early + 2 * head_grads, 0
    gradients = early or head_grads
    for name in reversed(trace.units):
        unit = trace.units[name]
        again = unit.kept_bytes if name in chosen else 0
        # Of the unit's largest tensor: what its activation function made of it, and the gradients before and behind it.
        working = again + 3 * unit.largest_bytes + unit.input_bytes
        own = model.unit_gradients.get(name, 0)
        most = max(most, remaining + gradients + working + own)
        largest_working = max(largest_working, working)
        remaining -= kept[name]
        if not early:
            gradients += own // shards
    return most, largest_working


def _largest(model: ModelBytes) -> int:
    return max(model.unit_gradients.values(), default=0)
