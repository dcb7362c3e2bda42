"""How many floating-point operations a training step must do, from the exact shapes of its images and real words.

Counted are matrix products and convolutions, a multiply-add as two, forward and backward. Padding is not counted, nor
what a step computes twice to save memory (recomputed blocks, GradCache's first pass), and attention counts the pairs
that the causal order lets see each other. So utilisation compares what is needed with what the device could do.
Letters: I images, B texts, L words of a text, P pairs of positions that see each other, N image features, Q image
tokens, D width, E embed_dim, V vocabulary.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.model.init import without_values
from opencoca.model.layers.attention import Attention
from opencoca.train.optim.optimizer import freeze_image_stages, freeze_parts, freeze_unused
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

    @property
    def total(self) -> float:
        return sum(self)


class ModelFlops:
    """Counts for one model and recipe; what is frozen and which losses there are is the recipe's."""

    def __init__(self, config: CoCaConfig, recipe: Recipe):
        """config: the architecture with its vocabulary; nothing of its size is allocated."""
        with without_values():
            model = CoCa(config)
        freeze(model, recipe)
        model.image_encoder.patch_dropout = recipe.encoder.patch_dropout  # pyright: ignore
        self.config, self.losses = config, recipe.loss
        start = recipe_stages(model, recipe) if recipe.encoder.cache_features else 0
        self.per_image, features = _image_encoder(model, start)
        self.pooling = _pooling(model, features, recipe)
        self.unimodal = _TextHalf.of(model.unimodal_decoder, _trains(model.unimodal_decoder), False)
        self.multimodal = _TextHalf.of(
            model.multimodal_decoder,
            _trains(model.multimodal_decoder),
            _trains(model.unimodal_decoder) or _trains(model.image_pooling) or _trains(model.image_encoder),
        )
        self.image_tokens = self.pooling.num_tokens
        self.head = model.lm_head.weight.numel()
        self.head_passes = 1 + model.lm_head.weight.requires_grad + 1
        self.text_proj = sum(p.numel() for p in model.text_proj.parameters())

    def __call__(self, num_images: int, lengths: Tensor | Iterable[int], all_texts: int | None = None) -> StepFlops:
        """num_images: I; lengths (B,): real words of each text, special ids included, [CLS] not.

        all_texts: texts of the whole global batch, which the images are compared with; None = B.
        """
        words = lengths if isinstance(lengths, Tensor) else torch.tensor(list(lengths))
        words = words.to("cpu", torch.float64)
        contrastive, captioning = self.losses.contrastive_weight != 0, self.losses.caption_weight != 0
        num_texts = len(words)
        with_cls = words + contrastive
        unimodal = self.unimodal(float(with_cls.sum()), float((with_cls * (with_cls + 1) / 2).sum()))
        if contrastive:
            unimodal += 3 * 2 * num_texts * self.text_proj
        multimodal = vocabulary = 0.0
        if captioning:
            inputs = (words - 1).clamp(min=0)
            seen = float(inputs.sum()) * self.image_tokens
            multimodal = self.multimodal(float(inputs.sum()), float((inputs * (inputs + 1) / 2).sum()))
            multimodal += self.multimodal.cross(num_images * self.image_tokens, seen)
            vocabulary = self.head_passes * 2 * self.head * float(inputs.sum())
        similarities = 0.0
        if contrastive:
            similarities = 3 * 2 * num_images * float(all_texts or num_texts) * self.config.embed_dim
        return StepFlops(
            image_encoder=num_images * self.per_image,
            poolers=num_images * self.pooling.per_image + self.pooling.per_batch if num_images else 0.0,
            unimodal=unimodal,
            multimodal=multimodal,
            vocabulary_loss=vocabulary,
            contrastive_loss=similarities,
        )


def freeze(model: CoCa, recipe: Recipe) -> None:
    """Stops gradients where training with this recipe would."""
    freeze_image_stages(model, recipe.encoder.frozen_stages)
    freeze_unused(model, recipe.loss.contrastive_weight != 0, recipe.loss.caption_weight != 0)
    freeze_parts(model, recipe)


def recipe_stages(model: CoCa, recipe: Recipe) -> int:
    """How many of the image encoder's first stages the recipe freezes."""
    count = recipe.encoder.frozen_stages
    return model.image_encoder.num_stages if count == -1 else count


class _Pooling(NamedTuple):
    per_image: float
    per_batch: float
    num_tokens: int


class _TextHalf(NamedTuple):
    """weights: matrix elements that a word meets; context_weights: those that an image token meets, of all layers.

    pair_width, cross_pair_width: what a pair of positions costs in all layers, a multiply-add as one.
    passes: how often the weights' products are done (forward, by the input, by the weight); attention's: pair_passes.
    """

    weights: int
    context_weights: int
    pair_width: int
    cross_pair_width: int
    passes: int
    pair_passes: int
    context_passes: int

    @staticmethod
    def of(module: nn.Module, is_trained: bool, has_trained_input: bool) -> "_TextHalf":
        weights = context = pair = cross_pair = 0
        for name, part in module.named_modules():
            is_cross = "cross_block" in name
            if isinstance(part, Attention):
                width = 2 * part.num_heads * part.head_dim
                pair, cross_pair = (pair, cross_pair + width) if is_cross else (pair + width, cross_pair)
            elif isinstance(part, nn.Linear):
                if is_cross and name.endswith("kv_proj"):
                    context += part.weight.numel()
                else:
                    weights += part.weight.numel()
        flows = is_trained or has_trained_input
        passes = 1 + flows + is_trained
        return _TextHalf(weights, context, pair, cross_pair, passes, 1 + 2 * flows, passes)

    def __call__(self, num_words: float, pairs: float) -> float:
        """Of words that attend to themselves and those before them."""
        return 2 * self.passes * self.weights * num_words + 2 * self.pair_passes * self.pair_width * pairs

    def cross(self, num_tokens: float, pairs: float) -> float:
        """Of the images' keys and values, and of the words that look at them."""
        return (
            2 * self.context_passes * self.context_weights * num_tokens
            + 2 * self.pair_passes * self.cross_pair_width * pairs
        )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _count(run: Callable[[], Result]) -> tuple[float, Result]:
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        result = run()
    return float(counter.get_total_flops()), result


def _image_encoder(model: CoCa, start: int) -> tuple[float, Tensor]:
    """FLOPs of one image from stage ``start`` on, forward and backward, and its features (1, N, C)."""
    encoder = model.image_encoder
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


def _pooling(model: CoCa, features: Tensor, recipe: Recipe) -> _Pooling:
    wants = {
        "captioning": recipe.loss.caption_weight != 0,
        "contrastive": recipe.loss.contrastive_weight != 0,
    }
    model.image_pooling.eval()
    one, pooled = _count(lambda: model.image_pooling(features, **wants))
    two, _ = _count(lambda: model.image_pooling(features.expand(2, -1, -1), **wants))
    project = 2 * sum(p.numel() for p in model.image_proj.parameters()) if wants["contrastive"] else 0
    is_trained = _trains(model.image_pooling) or _trains(model.image_proj)
    # Keys and values, most of the work, need a gradient by their input only if there is something before them to train.
    passes = 1 + is_trained + _trains(model.image_encoder)
    tokens = 0 if pooled.tokens is None else pooled.tokens.shape[1]
    return _Pooling(passes * (two - one + project), passes * (2 * one - two), tokens)
