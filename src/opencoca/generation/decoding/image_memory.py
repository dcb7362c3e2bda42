"""What decoding keeps of an image: keys and values of every layer, or the tokens themselves with projections folded.

Keys and values cost the same however few words look at them: for 255 tokens and twelve layers a fifth of a caption.
On a CPU, where few words will come, queries are taken into the space of the tokens instead: nothing is projected
beforehand, and every layer reads the same tokens (`opencoca.model.kernels.image_attention.FoldedImages`).

Letters: I images, N image tokens, C their width, R texts (consecutive ones share an image), T next words of each,
H heads, K key-value heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opencoca.generation.decoding.cache import KeysValues
from opencoca.model.coca import CoCa
from opencoca.model.kernels.image_attention import FoldedImages
from opencoca.model.layers.attention import Padded, attend


class ImageKeysValues(KeysValues):
    """Keys and values of the images in one layer, (2, I, K, N, d)."""

    def attend(self, queries: Tensor) -> Tensor:
        """queries (R x T, H, d) of the next words -> what they mixed (R x T, H, d)."""
        queries = queries.unflatten(0, (self.memory.shape[1], -1))
        return attend(queries, Padded(*self.memory)).flatten(0, 1)


ImageMemories = list[ImageKeysValues] | list[FoldedImages]
"""One for each layer, in their order; all of one kind."""


def remember(
    model: CoCa, image_tokens: Tensor, words_per_image: int, homes: Sequence[Tensor] | None = None
) -> ImageMemories:
    """What cross-attention needs of image_tokens (I, N, C), computed once for all words to come.

    words_per_image: about how many words will look at each image, by which the cheaper form is chosen.
    homes: where keys and values are to lie, if they must.
    """
    folded = model.fold_image(image_tokens, words_per_image) if homes is None else None
    if folded is not None:
        return folded
    # Side by side in memory, since every word reads them.
    pairs = map(torch.stack, model.project_image(image_tokens))
    if homes is None:
        return [ImageKeysValues(pair) for pair in pairs]
    count = image_tokens.shape[0]
    return [ImageKeysValues(home[:, :count].copy_(pair), home) for pair, home in zip(pairs, homes, strict=True)]


def words_like(memories: ImageMemories) -> Tensor:
    """A tensor of the type and on the device that the words' keys and values will have."""
    first = memories[0]
    return first.tokens if isinstance(first, FoldedImages) else first.memory


def num_images(memories: ImageMemories) -> int:
    """The number of images, I."""
    first = memories[0]
    return first.tokens.shape[0] if isinstance(first, FoldedImages) else first.memory.shape[1]


def select_images(memories: ImageMemories, images: Tensor) -> ImageMemories:
    """Keeps these images (I',), in this order."""
    if isinstance(memories[0], FoldedImages):
        tokens = memories[0].tokens.index_select(0, images)
        return [replace(memory, tokens=tokens) for memory in memories]  # pyright: ignore
    for memory in memories:
        memory.select(images)  # pyright: ignore
    return memories
