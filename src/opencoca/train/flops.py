"""How many floating-point operations a training step must do, and how well a run uses its device.

Operations are counted from the exact shapes of images and real words: matrix products and convolutions, a multiply-add
as two, forward and backward. Padding is not counted, nor what a step computes twice to save memory (recomputed blocks,
GradCache's first pass), and attention counts the pairs that the causal order lets see each other. So utilisation
compares what is needed with what the device could do.
Letters: I images, B texts, L words of a text, P pairs of positions that see each other, N image features, Q image
tokens, D width, E embed_dim, V vocabulary.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opencoca.data import Batch
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.model.init import without_values
from opencoca.model.structure import ProductSizes, Structure
from opencoca.system.devices import peak_flops
from opencoca.system.memory_use import peak_bytes
from opencoca.tasks import Task
from opencoca.tasks.task import Uses
from opencoca.train.optim.optimizer import freeze
from opencoca.train.recipe.recipe import Recipe

Result = TypeVar("Result")


class StepFlops(NamedTuple):
    """Floating-point operations of a step by part; poolers include the projection of the image's vector."""

    image_encoder: float
    poolers: float
    unimodal: float
    multimodal: float
    vocabulary_loss: float
    contrastive_loss: float
    task_head: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


class ModelFlops:
    """Counts for one model and recipe; the recipe and its task say what is frozen and which halves are used."""

    def __init__(self, config: CoCaConfig, recipe: Recipe, task: Task | None = None):
        """config: the architecture with its vocabulary and the task's head; nothing of its size is allocated."""
        with without_values():
            model = CoCa(config)
        frozen_stages = freeze(model, recipe, task)
        model.set_patch_dropout(recipe.encoder.patch_dropout)
        self.config, self.uses, self.width = config, recipe.task.uses, compared_width(config, recipe.task.uses)
        start = frozen_stages if recipe.encoder.cache_features else 0
        self.per_image, features = _image_encoder(model, start)
        self.pooling = _pooling(model, features, self.uses)
        self.per_image_head = _task_head(model, features)
        structure = model.structure()
        self.unimodal = _TextHalf.of(structure, "unimodal_decoder")
        inputs = ("image_encoder", "image_pooling", "unimodal_decoder")
        self.multimodal = _TextHalf.of(structure, "multimodal_decoder", inputs)
        self.image_tokens = self.pooling.num_tokens
        self.head = model.vocab_weight.numel()
        self.head_passes = 1 + model.vocab_weight.requires_grad + 1
        self.proj = _projection(config)

    def __call__(self, num_images: int, lengths: Tensor | Iterable[int], all_texts: int | None = None) -> StepFlops:
        """num_images: I; lengths (B,): real words of each text, special ids included, [CLS] not.

        all_texts: texts of the whole global batch, which the images are compared with; None = B.
        """
        words = lengths if isinstance(lengths, Tensor) else torch.tensor(list(lengths))
        words = words.to("cpu", torch.float64)
        contrastive, captioning, linear_alone = self.uses
        num_texts = len(words)
        with_cls = words + contrastive
        unimodal = self.unimodal(float(with_cls.sum()), float((with_cls * (with_cls + 1) / 2).sum()))
        if linear_alone:
            unimodal = 0.0
        elif contrastive:
            unimodal += 3 * 2 * num_texts * self.proj
        multimodal = vocabulary = 0.0
        if captioning:
            inputs = (words - 1).clamp(min=0)
            seen = float(inputs.sum()) * self.image_tokens
            multimodal = self.multimodal(float(inputs.sum()), float((inputs * (inputs + 1) / 2).sum()))
            multimodal += self.multimodal.cross(num_images * self.image_tokens, seen)
            vocabulary = self.head_passes * 2 * self.head * float(inputs.sum())
        similarities = 0.0
        if contrastive:
            similarities = 3 * 2 * num_images * float(all_texts or num_texts) * self.width
        return StepFlops(
            image_encoder=num_images * self.per_image,
            poolers=num_images * self.pooling.per_image + self.pooling.per_batch if num_images else 0.0,
            unimodal=unimodal,
            multimodal=multimodal,
            vocabulary_loss=vocabulary,
            contrastive_loss=similarities,
            task_head=num_images * self.per_image_head,
        )


class Throughput:
    """Measures how well this process's device is used, for its part of every batch."""

    def __init__(self, config: CoCaConfig, recipe: Recipe, task: Task, device: torch.device, num_processes: int = 1):
        """config: the architecture with its vocabulary. The rate of an unknown device is measured, which is brief."""
        self.device, self.peak = device, peak_flops(device, recipe.precision)
        self._count = ModelFlops(config, recipe, task)
        self._rows = num_processes / recipe.accumulation_steps

    def flops(self, batch: Batch) -> float:
        """Operations that a step on this process's batch needs (see `ModelFlops`)."""
        all_texts = round(len(batch.token_ids) * self._rows)
        return self._count(batch.num_samples, batch.token_mask.sum(dim=1), all_texts).total

    def figures(self, flops_per_sec: float) -> dict[str, float]:
        """For a line of the log: utilisation (1 = the device's peak rate), and the most memory so far."""
        return {
            "model_flops_per_sec": flops_per_sec,
            "model_flops_utilisation": flops_per_sec / self.peak,
            "memory_bytes": float(peak_bytes(self.device)),
        }


class _Pooling(NamedTuple):
    per_image: float
    per_batch: float
    num_tokens: int


class _TextHalf(NamedTuple):
    """Counts the operations of one decoder.

    sizes: of its matrix products. passes: how often a product with weights is done in a step (forward, for the
    gradient by the input, for that by the weight); pair_passes: how often a product of attention is.
    """

    sizes: ProductSizes
    passes: int
    pair_passes: int

    @staticmethod
    def of(structure: Structure, part: str, inputs: tuple[str, ...] = ()) -> "_TextHalf":
        """inputs: the parts whose outputs it computes with."""
        is_trained = structure.trains(part)
        flows = is_trained or structure.trains(*inputs)
        return _TextHalf(structure.product_sizes(part), 1 + flows + is_trained, 1 + 2 * flows)

    def __call__(self, num_words: float, pairs: float) -> float:
        """The operations of words that attend to themselves and those before them."""
        return 2 * self.passes * self.sizes.weights * num_words + 2 * self.pair_passes * self.sizes.pair_width * pairs

    def cross(self, num_tokens: float, pairs: float) -> float:
        """The operations of the images' keys and values, and of the words that look at them."""
        return (
            2 * self.passes * self.sizes.context_weights * num_tokens
            + 2 * self.pair_passes * self.sizes.cross_pair_width * pairs
        )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _count(run: Callable[[], Result]) -> tuple[float, Result]:
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        result = run()
    return float(counter.get_total_flops()), result


def _image_encoder(model: CoCa, start: int) -> tuple[float, Tensor]:
    """FLOPs of one image from stage ``start`` on, forward and backward, and its features (1, N, C)."""
    encoder = model.structure().image_encoder
    x = torch.empty(1, 3, *model.config.image.image_size, device="meta")
    total, has_trained = 0.0, False
    encoder.train()
    for index in range(encoder.num_stages):
        forward, x = _count(partial(encoder.run_stages, x, index, index + 1))
        x = x.detach()
        is_trained = _trains(encoder.stages[index])
        if index >= start:
            total += forward * (1 + is_trained + has_trained)
        has_trained = has_trained or is_trained
    return total, x


def _task_head(model: CoCa, features: Tensor) -> float:
    """FLOPs of the task's head for one image, forward and backward; its queries count as if they were an image's."""
    if model.config.head is None:
        return 0.0
    forward, _ = _count(lambda: model.head_logits(features))
    return forward * (2 + model.structure().trains("image_encoder"))


def _pooling(model: CoCa, features: Tensor, uses: Uses) -> _Pooling:
    contrastive, structure = uses.contrastive, model.structure()
    wants = {"captioning": uses.captioning, "contrastive": contrastive}
    model.eval()
    if not any(uses):
        return _Pooling(0.0, 0.0, 0)
    branch = model.linear_branch
    if uses.linear_alone and branch is not None:
        trained, fitted = branch.image_weights()
        return _Pooling(2.0 * (2 * trained + fitted), 0.0, 0)  # forward, and for the gradient by what is trained
    one, pooled = _count(lambda: model.pool_features(features, **wants))
    two, _ = _count(lambda: model.pool_features(features.expand(2, -1, -1), **wants))
    project = 2 * _projection(model.config) if contrastive else 0
    is_trained = structure.trains("image_pooling") or (contrastive and structure.trains("heads"))
    # Keys and values, most of the work, need a gradient by their input only if there is something before them to train.
    passes = 1 + is_trained + structure.trains("image_encoder")
    tokens = 0 if pooled.tokens is None else pooled.tokens.shape[1]
    return _Pooling(passes * (two - one + project), passes * (2 * one - two), tokens)


def compared_width(config: CoCaConfig, uses: Uses) -> int:
    """How many numbers of embeddings are compared: those of the deep encoders, and of the linear branch."""
    return config.linear.dim + (0 if uses.linear_alone else config.embed_dim)


def _projection(config: CoCaConfig) -> int:
    """Matrix elements of the projection of either vector."""
    return config.embed_dim * config.text.width if config.projects_embeds else 0
