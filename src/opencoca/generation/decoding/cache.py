"""Keys and values that decoding keeps from word to word, one object for each layer.

Letters: B rows, R texts, T next words of each, H heads, K key-value heads, N entries, d head width.
"""

import torch
from torch import Tensor

from opencoca.model.config import BlockConfig
from opencoca.model.kernels.choice import Mask
from opencoca.model.layers.attention import NextWords, Padded, attend


class KeysValues:
    """Keys and values of one layer: memory (2, B, K, N, d), whose rows can be dropped, repeated and reordered.

    home: a tensor whose first rows they are, if they must stay where they are; rows then change places within it.
    """

    def __init__(self, memory: Tensor, home: Tensor | None = None):
        self.memory, self._home = memory, home

    def select(self, rows: Tensor) -> None:
        """Keeps these rows (B',), in this order; there may be more of them than before."""
        kept = self.memory.index_select(1, rows)
        self.memory = kept if self._home is None else self._home[:, : rows.shape[0]].copy_(kept)


class WordCache(KeysValues):
    """The words so far of one self-attention layer; texts that share a row have their words there side by side."""

    @classmethod
    def new(cls, num_rows: int, block: BlockConfig, entries: int, like: Tensor) -> "WordCache":
        """An empty one of float32 at least on a CPU: attention in half precision takes up to three times as long."""
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_cpu else like.dtype
        return cls(like.new_empty(2, num_rows, block.num_kv_heads, entries, block.head_dim, dtype=dtype))

    def attend(self, queries: Tensor, keys_values: Tensor, words: NextWords) -> Tensor:
        """queries (R x T, H, d), keys and values (R x T, 2, K, d) of the next words -> what they mixed (R x T, H, d).

        The keys and values are kept.
        """
        rows, dtype = self.memory.shape[1], queries.dtype
        queries = queries.unflatten(0, (rows, -1)).to(self.memory.dtype)
        keys_values = keys_values.unflatten(0, (rows, -1)).permute(2, 0, 3, 1, 4)
        if isinstance(words.places, slice):
            self.memory[:, :, :, words.places] = keys_values
            keys, values = self.memory[:, :, :, : words.places.stop]
        else:
            keys, values = self.memory.index_copy_(3, words.places, keys_values)
        mask = Mask("causal" if words.causal else "free", visible=words.visible)
        return attend(queries, Padded(keys, values), mask).to(dtype).flatten(0, 1)

    def branch(self, rows: Tensor, length: int, extra: int) -> "WordCache":
        """A copy of the first entries of these rows (B',) with room for so many more."""
        _, _, heads, _, head_dim = self.memory.shape
        memory = self.memory.new_empty(2, rows.shape[0], heads, length + extra, head_dim)
        memory[:, :, :, :length] = self.memory[:, rows, :, :length]
        return WordCache(memory)
