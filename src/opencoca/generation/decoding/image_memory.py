"""What decoding keeps of an image: keys and values of every layer, or the tokens themselves with projections folded.

Keys and values cost the same however few words look at them: for 255 tokens and twelve layers a fifth of a caption.
On a CPU, where few words will come, queries are taken into the space of the tokens instead (see `image_attention`):
nothing is projected beforehand, and every layer reads the same tokens.

Letters: I images, N image tokens, C their width, R texts (consecutive ones share an image), T next words of each,
H heads, K key-value heads, d head width, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.generation.decoding.cache import KeysValues
from opencoca.model.kernels.image_attention import fold, pays
from opencoca.model.layers.attention import Attention, NextWords, attend
from opencoca.model.layers.blocks import TransformerBlock


class ImageKeysValues(KeysValues):
    """Keys and values of the images in one layer."""

    def attend(self, attn: Attention, x: Tensor, words: NextWords) -> Tensor:
        """x (R x T, D): the next words -> what attention makes of them, (R x T, D)."""
        keys, values = self.memory
        queries = attn.q_proj(x).view(keys.shape[0], -1, attn.num_heads, attn.head_dim).transpose(1, 2)
        mixed = attend(queries, keys, values, causal=False)
        return attn.out_proj(mixed.transpose(1, 2).flatten(0, 1).flatten(1))


@dataclass
class FoldedImages:
    """Images as one layer looks at them: tokens (I, N, C), one tensor for all layers, normalised if the layers do so.

    key_weight, value_weight (K, d, C); constant (H, 1, d): what is added to everything mixed.
    """

    tokens: Tensor
    key_weight: Tensor
    value_weight: Tensor
    constant: Tensor | None

    def attend(self, attn: Attention, x: Tensor, words: NextWords) -> Tensor:
        """x (R x T, D): the next words -> what attention makes of them, (R x T, D)."""
        images, kv_heads, head_dim = self.tokens.shape[0], attn.num_kv_heads, attn.head_dim
        queries = attn.q_proj(x).view(images, -1, attn.num_heads, head_dim).transpose(1, 2)
        by_head = queries.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, head_dim)
        absorbed = torch.bmm(by_head * head_dim**-0.5, self.key_weight).unflatten(1, (images, -1))
        absorbed = absorbed.transpose(0, 1).flatten(1, 2)
        weights = torch.bmm(absorbed, self.tokens.transpose(1, 2)).softmax(dim=-1)
        mixed = torch.bmm(weights, self.tokens).unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        values = torch.bmm(mixed, self.value_weight.transpose(1, 2)).unflatten(1, (images, -1))
        values = values.transpose(0, 1).reshape(queries.shape)
        values = values if self.constant is None else values + self.constant
        return attn.out_proj(values.transpose(1, 2).flatten(0, 1).flatten(1))


ImageMemories = list[ImageKeysValues] | list[FoldedImages]
"""One for each layer, in their order; all of one kind."""


def remember(
    image_tokens: Tensor, blocks: list[TransformerBlock], words_per_image: int, homes: Sequence[Tensor] | None = None
) -> ImageMemories:
    """What the cross-attention of each block needs of image_tokens (I, N, C), computed once for all words to come.

    words_per_image: about how many words will look at each image, by which the cheaper form is chosen.
    homes: where keys and values are to lie, if they must.
    """
    if homes is None and _folds(image_tokens, blocks, words_per_image):
        return _fold_all(image_tokens, blocks)
    # Side by side in memory, since every word reads them.
    pairs = (torch.stack(block.project_context(image_tokens)) for block in blocks)
    if homes is None:
        return [ImageKeysValues(pair) for pair in pairs]
    count = image_tokens.shape[0]
    return [ImageKeysValues(home[:, :count].copy_(pair), home) for pair, home in zip(pairs, homes, strict=True)]


def words_like(memories: ImageMemories) -> Tensor:
    """A tensor of the type and on the device that the words' keys and values will have."""
    first = memories[0]
    return first.tokens if isinstance(first, FoldedImages) else first.memory


def num_images(memories: ImageMemories) -> int:
    """I."""
    first = memories[0]
    return first.tokens.shape[0] if isinstance(first, FoldedImages) else first.memory.shape[1]


def select_images(memories: ImageMemories, images: Tensor) -> None:
    """Keeps these images (I',), in this order."""
    first = memories[0]
    tokens = first.tokens.index_select(0, images) if isinstance(first, FoldedImages) else None
    for memory in memories:
        if isinstance(memory, FoldedImages):
            assert tokens is not None
            memory.tokens = tokens
        else:
            memory.select(images)


def _folds(image_tokens: Tensor, blocks: list[TransformerBlock], words_per_image: int) -> bool:
    if image_tokens.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    for attn in (block.attn for block in blocks):
        sizes = image_tokens.shape[1], attn.num_heads * attn.head_dim, attn.num_heads
        if attn.kv_proj.weight.dtype != image_tokens.dtype or not pays(words_per_image, *sizes, attn.kv_proj):
            return False
    return True


def _fold_all(image_tokens: Tensor, blocks: list[TransformerBlock]) -> list[FoldedImages]:
    norm = blocks[0].norm_context
    if isinstance(norm, nn.LayerNorm):
        image_tokens = F.layer_norm(image_tokens, image_tokens.shape[-1:], eps=norm.eps)
    folded = []
    for block in blocks:
        attn = block.attn
        (key_weight, value_weight), constants = fold(attn.kv_proj, block.norm_context, attn.num_kv_heads)
        constant = None
        if constants:
            groups = attn.num_heads // attn.num_kv_heads
            constant = torch.stack(constants).sum(0).repeat_interleave(groups, dim=0).unsqueeze(1)
        folded.append(FoldedImages(image_tokens, key_weight, value_weight, constant))
    return folded
