"""Memory of decoding that stays in one place, so that a recorded step finds there what it read when it was recorded.

Letters: I images, N image tokens, C cache rows, K key-value heads, d head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opencoca.generation.decoding.cache import KeyValueCache
from opencoca.model.coca import CoCa
from opencoca.model.config import BlockConfig


@dataclass(frozen=True)
class ArenaSize:
    """The most images, cache rows and entries of a row that an arena holds, and how many tokens an image has."""

    images: int
    rows: int
    entries: int
    image_tokens: int

    def holds(self, other: "ArenaSize") -> bool:
        """Whether what needs the other size fits."""
        return (
            self.images >= other.images
            and self.rows >= other.rows
            and self.entries >= other.entries
            and self.image_tokens == other.image_tokens
        )

    def joined(self, other: "ArenaSize") -> "ArenaSize":
        """What holds both, if images have as many tokens; else this one."""
        if self.image_tokens != other.image_tokens:
            return self
        return ArenaSize(
            max(self.images, other.images),
            max(self.rows, other.rows),
            max(self.entries, other.entries),
            self.image_tokens,
        )

    def num_bytes(self, model: CoCa, dtype: torch.dtype) -> int:
        """Of an arena of this size."""
        text = model.config.text
        own, cross = model.config.unimodal_block(), model.config.multimodal_block()
        per_entry = text.unimodal_depth * own.num_kv_heads * own.head_dim
        per_token = text.multimodal_depth * cross.num_kv_heads * cross.head_dim
        numbers = self.rows * self.entries * (per_entry + per_token) + self.images * self.image_tokens * per_token
        return 2 * numbers * dtype.itemsize


class ArenaCache(KeyValueCache):
    """A cache in an arena's memory (2, rows, K, entries, d): rows change places within it.

    Entries that no word has filled are zero: what a mask hides must still be a number.
    """

    def __init__(self, memory: Tensor, num_rows: int, entries: int):
        self._memory = memory[:, :, :, :entries]
        self.keys, self.values = self._memory[:, :num_rows].zero_()
        self.visible = None
        self.texts_per_row = 1
        self.length = 0

    def select(self, rows: Tensor) -> None:
        """Keeps these rows (R,), in this order; there may be more of them than before."""
        kept = self._memory[:, : self.keys.shape[0]].index_select(1, rows)
        self.keys, self.values = self._memory[:, : rows.shape[0]].copy_(kept)
        if self.visible is not None:
            self.visible = self.visible.index_select(0, rows)


class Window:
    """The first entries of the first rows of a cache, for a step of which nothing but numbers in tensors changes.

    places (P,): the entries that the words of each row are written to; keys, values: (C, K, entries, d).
    """

    def __init__(self, memory: Tensor, num_rows: int, num_entries: int, places: Tensor):
        self.keys, self.values = memory[:, :num_rows, :, :num_entries]
        self.places = places
        self.texts_per_row = places.shape[0]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys, values (C, K, P, d) in their places; returns the whole window."""
        self.keys.index_copy_(2, self.places, keys)
        self.values.index_copy_(2, self.places, values)
        return self.keys, self.values


class DecodingArena:
    """Caches of both halves of the decoder, and keys and values of the images, of every layer: (2, ...) each."""

    def __init__(self, model: CoCa, size: ArenaSize, like: Tensor):
        text = model.config.text

        def new(depth: int, rows: int, block: BlockConfig, length: int) -> list[Tensor]:
            shape = (2, rows, block.num_kv_heads, length, block.head_dim)
            return [like.new_zeros(shape) for _ in range(depth)]

        self.size, self.dtype, self.device = size, like.dtype, like.device
        multimodal = model.config.multimodal_block()
        self.unimodal = new(text.unimodal_depth, size.rows, model.config.unimodal_block(), size.entries)
        self.multimodal = new(text.multimodal_depth, size.rows, multimodal, size.entries)
        self.images = new(text.multimodal_depth, size.images, multimodal, size.image_tokens)

    def serves(self, size: ArenaSize, like: Tensor) -> bool:
        """Whether this arena can be used for what needs such a size and such tensors."""
        return self.size.holds(size) and (self.dtype, self.device) == (like.dtype, like.device)

    def new_caches(self, num_rows: int, entries: int) -> tuple[list[KeyValueCache], list[KeyValueCache]]:
        """Empty caches of the unimodal and of the multimodal half."""
        unimodal: list[KeyValueCache] = [ArenaCache(memory, num_rows, entries) for memory in self.unimodal]
        multimodal: list[KeyValueCache] = [ArenaCache(memory, num_rows, entries) for memory in self.multimodal]
        return unimodal, multimodal

    def place_image(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (I, K, N, d) of one layer, copied here."""
        num_images, memory = keys.shape[0], self.images[layer]
        return memory[0, :num_images].copy_(keys), memory[1, :num_images].copy_(values)

    def select_images(self, images: Tensor, num_images: int) -> list[tuple[Tensor, Tensor]]:
        """Keeps these (I',) of the first num_images, in this order; there are not more of them than before."""
        kept = []
        for memory in self.images:
            keys, values = memory[:, : images.shape[0]].copy_(memory[:, :num_images].index_select(1, images))
            kept.append((keys, values))
        return kept
