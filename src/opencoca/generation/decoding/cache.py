"""Key-value caches: what self-attention of new words needs of the words before them.

Letters: B cache rows, K key-value heads, T new words, d head width.
"""

import torch
from torch import Tensor

from opencoca.model.config import BlockConfig


class KeyValueCache:
    """Keys and values of one self-attention layer, of the positions that have been decoded so far.

    keys, values: (B, K, capacity, d), allocated once; ``length`` positions of them are filled. On a CPU they are
        float32 at least: attention of few words in half precision takes up to three times as long there.
    visible: (B, capacity) which positions attention may see; None = all of them.
    texts_per_row: how many texts write into each row, side by side, and see what a mask lets them see.
    """

    def __init__(self, batch_size: int, config: BlockConfig, capacity: int, like: Tensor):
        shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
        on_cpu = like.device.type == "cpu"
        dtype = torch.promote_types(like.dtype, torch.float32) if on_cpu else like.dtype
        self.keys, self.values = like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype)
        self.visible: Tensor | None = None
        self.texts_per_row = 1
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys, values (B, K, T, d) behind those there; returns views of all: (B, K, length, d)."""
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[2], "the cache is full"
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps these rows (R,), in this order: drops finished texts, reorders beams."""
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)
        if self.visible is not None:
            self.visible = self.visible.index_select(0, rows)

    def branch(self, rows: Tensor, texts_per_row: int, extra: int) -> "KeyValueCache":
        """A copy of these rows (R,) with room for so many more entries."""
        copy = KeyValueCache.__new__(KeyValueCache)
        shape = (rows.shape[0], self.keys.shape[1], self.length + extra, self.keys.shape[3])
        copy.keys, copy.values = self.keys.new_empty(shape), self.values.new_empty(shape)
        copy.keys[:, :, : self.length] = self.keys[rows, :, : self.length]
        copy.values[:, :, : self.length] = self.values[rows, :, : self.length]
        copy.visible, copy.texts_per_row, copy.length = None, texts_per_row, self.length
        return copy
