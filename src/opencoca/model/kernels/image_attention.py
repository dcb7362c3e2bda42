"""Cross-attention of few words over many image tokens, on a CPU: the words are projected, not the image.

A caption has about 13 words and the image 256 tokens, whose keys and values every layer would make anew. A query's
product with a key, q (W x), is (W^T q) x: so queries are taken into the space of the tokens, weigh and mix the tokens
themselves, and what they mixed is projected. That is the same function for a fraction of the products, and neither
keys nor values are kept for the gradient. What a layer's norm of the tokens does after normalising them, scale and
shift, is folded into its projections, so that the normalised tokens are the same for all layers. For 16 images of 255
tokens with a caption each, 2.8 times as fast as keys and values (float32, an AMD EPYC: results/attention_forms.md).
Letters: I images, N image tokens, C their width, S words, H heads, K key-value heads, d head width, R images of a
bucket, T the words that each of them has room for.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opencoca.model.kernels.dense_attention import mix
from opencoca.model.kernels.packed_attention import Buckets, Places

# Numbers of words of an image are rounded up to this; more kinds of length are more and smaller products.
_ROUNDING = 4


@dataclass(frozen=True)
class SharedImages:
    """Image tokens as all layers look at them in training.

    tokens (I, N, C): images with similar numbers of words side by side.
    places: where the words (H S, C), one head's after another's, stand in the padded words.
    """

    tokens: Tensor
    buckets: Buckets
    places: Places

    @staticmethod
    def of(image_tokens: Tensor, words_per_image: Tensor, num_heads: int, norm: nn.Module) -> "SharedImages":
        """image_tokens (I, N, C), words_per_image (I,); norm: one layer's norm of the tokens, if they have one."""
        buckets = Buckets.of(words_per_image, _ROUNDING)
        tokens = image_tokens.index_select(0, buckets.order)
        if isinstance(norm, nn.LayerNorm):
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps)
        num_words = len(buckets.row)
        places = buckets.places(num_heads)
        slots = places.slots.view(num_words, num_heads).T.flatten()
        sources = places.sources % num_heads * num_words + places.sources.div(num_heads, rounding_mode="floor")
        return SharedImages(tokens, buckets, places._replace(slots=slots, sources=sources))


@dataclass(frozen=True)
class FoldedImages:
    """Images as one layer looks at them with few words each: tokens (I, N, C), one tensor for all layers.

    They are normalised if the layers normalise them. key_weight, value_weight (K, d, C); constant (H, 1, d): what is
    added to everything mixed.
    """

    tokens: Tensor
    key_weight: Tensor
    value_weight: Tensor
    constant: Tensor | None

    @staticmethod
    def of(tokens: Tensor, kv_proj: nn.Linear, norm: nn.Module, num_heads: int, num_kv_heads: int) -> "FoldedImages":
        """For a layer whose keys and values are kv_proj(norm(...)); tokens: as its norm, if any, normalises them."""
        (key_weight, value_weight), constants = fold(kv_proj, norm, num_kv_heads)
        constant = None
        if constants:
            constant = torch.stack(constants).sum(0).repeat_interleave(num_heads // num_kv_heads, dim=0).unsqueeze(1)
        return FoldedImages(tokens, key_weight, value_weight, constant)

    def attend(self, queries: Tensor) -> Tensor:
        """queries (R, H, d), as many of each image -> what they mixed (R, H, d)."""
        images, kv_heads, head_dim = self.tokens.shape[0], *self.key_weight.shape[:2]
        queries = queries.unflatten(0, (images, -1)).transpose(1, 2)
        by_head = queries.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, head_dim)
        absorbed = torch.bmm(by_head * head_dim**-0.5, self.key_weight).unflatten(1, (images, -1))
        absorbed = absorbed.transpose(0, 1).flatten(1, 2)
        weights = torch.bmm(absorbed, self.tokens.transpose(1, 2)).softmax(dim=-1)
        mixed = torch.bmm(weights, self.tokens).unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        values = torch.bmm(mixed, self.value_weight.transpose(1, 2)).unflatten(1, (images, -1))
        values = values.transpose(0, 1).reshape(queries.shape)
        values = values if self.constant is None else values + self.constant
        return values.transpose(1, 2).flatten(0, 1)


def attend_to_images(
    queries: Tensor, images: SharedImages, kv_proj: nn.Linear, norm: nn.Module, num_kv_heads: int
) -> Tensor:
    """queries (S, H, d) -> what they mixed (S, H, d): cross-attention over keys and values kv_proj(norm(tokens))."""
    num_words, num_heads, head_dim = queries.shape
    groups, width = num_heads // num_kv_heads, kv_proj.in_features
    scaled, constants = fold(kv_proj, norm, num_kv_heads)
    scaled = scaled.to(images.tokens.dtype)
    by_head = queries.permute(1, 0, 2).reshape(num_kv_heads, groups * num_words, head_dim).to(scaled.dtype)
    absorbed = torch.bmm(by_head, scaled[0] * head_dim**-0.5).view(num_heads * num_words, width)
    mixed = _MixTokens.apply(absorbed, images.tokens, images)
    values = torch.bmm(mixed.view(num_kv_heads, groups * num_words, width), scaled[1].transpose(1, 2))
    values = values.view(num_heads, num_words, head_dim).transpose(0, 1)
    for constant in constants:
        values = values + constant.to(values.dtype).repeat_interleave(groups, dim=0)
    return values


def fold(kv_proj: nn.Linear, norm: nn.Module, num_kv_heads: int) -> tuple[Tensor, list[Tensor]]:
    """``kv_proj`` for tokens that ``norm`` has normalised, but not scaled or shifted: (2, K, d, C).

    Also what is to be added to everything that is mixed, (K, d) each: weights sum to 1, so what is added to every value
    is added to every mixture, and no key's constant matters.
    """
    weight = kv_proj.weight.view(2, num_kv_heads, -1, kv_proj.in_features)
    scaled = weight * norm.weight if isinstance(norm, nn.LayerNorm) else weight
    constants = []
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        constants.append(weight[1] @ norm.bias)
    if kv_proj.bias is not None:
        constants.append(kv_proj.bias.view(2, num_kv_heads, -1)[1])
    return scaled, constants


class _MixTokens(torch.autograd.Function):
    """queries (H S, C) -> (H S, C): the tokens of the word's image, weighed by a softmax of their products."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, tokens: Tensor, images: SharedImages) -> Tensor:
        padded = queries.index_select(0, images.places.sources)
        mixed = torch.empty_like(padded)
        weights = []
        for query, token, out in _by_bucket(images, tokens, padded, mixed):
            weights.append(mix(query, token, token, out, None))
        ctx.save_for_backward(padded, tokens, *weights)
        ctx.images = images
        return mixed.index_select(0, images.places.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        padded, tokens, *weights = ctx.saved_tensors
        images = ctx.images
        grad_mixed = grad_outputs[0].index_select(0, images.places.sources)
        grad_mixed.index_fill_(0, images.places.padding, 0)
        grad_queries, grad_tokens = torch.empty_like(padded), torch.empty_like(tokens)
        buckets = _by_bucket(images, tokens, padded, grad_mixed, grad_queries, grad_tokens)
        for weight, (query, token, grad_out, grad_query, grad_token) in zip(weights, buckets, strict=True):
            torch.bmm(weight.transpose(1, 2), grad_out, out=grad_token)
            grad_weight = torch.bmm(grad_out, token.transpose(1, 2))
            grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            torch.bmm(grad_score, token, out=grad_query)
            grad_token.baddbmm_(grad_score.transpose(1, 2), query)
        return grad_queries.index_select(0, images.places.slots), grad_tokens, None


def _by_bucket(images: SharedImages, tokens: Tensor, padded: Tensor, other: Tensor, *grads: Tensor):
    """Yields for each bucket its queries (R, H T, C), tokens (R, N, C), part of other, and parts of grads."""
    num_heads = len(images.places.slots) // max(1, len(images.buckets.row))
    image = place = 0
    for rows, length in images.buckets.shapes:
        own = slice(image, image + rows)
        words = slice(place, place + rows * length * num_heads)
        parts = [padded[words], tokens[own], other[words]]
        parts += [grad[own] if grad.dim() == 3 else grad[words] for grad in grads]
        yield [part.view(rows, -1, part.shape[-1]) for part in parts]
        image, place = own.stop, words.stop
