"""Memory of decoding that stays in one place, so that a recorded step finds there what it read when it was recorded.

Letters: I images, N image tokens, C cache rows, K key-value heads, d head width.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from opencoca.generation.decoding.state import WordCache
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
        """Whether an arena of this size has room for one of the other."""
        return self.joined(other) == self and self.image_tokens == other.image_tokens

    def joined(self, other: "ArenaSize") -> "ArenaSize":
        """The least size that holds both, if their images have equally many tokens; else this one."""
        if self.image_tokens != other.image_tokens:
            return self
        return ArenaSize(*map(max, astuple(self), astuple(other)))

    def num_bytes(self, model: CoCa, dtype: torch.dtype) -> int:
        """The bytes that an arena of this size takes."""
        text = model.config.text
        own, cross = model.config.unimodal_block(), model.config.multimodal_block()
        per_entry = text.unimodal_depth * own.num_kv_heads * own.head_dim
        per_token = text.multimodal_depth * cross.num_kv_heads * cross.head_dim
        numbers = self.rows * self.entries * (per_entry + per_token) + self.images * self.image_tokens * per_token
        return 2 * numbers * dtype.itemsize


class DecodingArena:
    """Caches of both halves of the decoder, and keys and values of the images: of each layer (2, C or I, K, ..., d)."""

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

    def new_caches(self, num_rows: int, entries: int) -> tuple[list[WordCache], list[WordCache]]:
        """Empty caches of both halves. They are zero: what a mask hides must still be a number."""
        unimodal, multimodal = (
            [WordCache(home[:, :num_rows].zero_(), home) for home in (whole[:, :, :, :entries] for whole in memories)]
            for memories in (self.unimodal, self.multimodal)
        )
        return unimodal, multimodal
