"""What decoding carries from word to word, so that each step computes the new words alone.

Of the words: keys and values, one object for each layer. Texts of one image may share a cache row (beams): what they
wrote lies there side by side, in the order in which it was written, and a mask says which entries each of them sees.
Beams then change places, or go on from one parent, by the mask alone: no keys or values are moved, and what several
texts have in common is there once.

Of an image: keys and values of every layer, or the tokens themselves with projections folded. Keys and values cost the
same however few words look at them: for 255 tokens and twelve layers a fifth of a caption. On a CPU, where few words
will come, queries are taken into the space of the tokens instead: nothing is projected beforehand, and every layer
reads the same tokens (`opencoca.model.kernels.image_attention.FoldedImages`).

Letters: I images, R texts (consecutive ones share an image), T next words of each, C or B cache rows, P texts of a row,
N cache entries or image tokens, D their width, H heads, K key-value heads, d head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opencoca.model.coca import CoCa
from opencoca.model.config import BlockConfig, Compat
from opencoca.model.kernels.choice import Mask
from opencoca.model.kernels.image_attention import FoldedImages
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
    """What cross-attention needs of image_tokens (I, N, D), computed once for all words to come.

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


@dataclass
class DecodingState:
    """What is kept of the images and of the words so far.

    num_words: how many words of each text there are; num_entries: how many entries of a cache row they fill.
    texts_per_row: P.
    seen (C, P, capacity): the entries that hold each text's words, where texts share rows.
    hidden (C, capacity): the entries that unimodal attention does not see, for `Compat.text_hidden_id`.
    last_ids (R, 1): the last word of each text. recorded: another way to compute the steps
    after the prompt, if there is one: see `opencoca.generation.decoding.graphs`.
    """

    images: ImageMemories
    unimodal: list[WordCache]
    multimodal: list[WordCache]
    hidden: Tensor | None = None
    recorded: "Callable[[Tensor, DecodingState], Tensor] | None" = None
    num_words: int = 0
    num_entries: int = 0
    texts_per_row: int = 1
    seen: Tensor | None = None
    last_ids: Tensor | None = None

    @property
    def memory(self) -> Tensor:
        """Keys and values of the first layer's words, (2, C, K, capacity, d), as an example of all."""
        return self.unimodal[0].memory

    @property
    def rows_per_image(self) -> int:
        """How many cache rows belong to each image."""
        return self.memory.shape[1] // num_images(self.images)

    def entries_of_texts(self) -> Tensor:
        """(R, capacity): which cache entries hold the words of each text."""
        if self.seen is not None:
            return self.seen.flatten(0, 1)
        _, rows, _, capacity, _ = self.memory.shape
        return (torch.arange(capacity, device=self.memory.device) < self.num_entries).expand(rows, -1)

    def select(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Keeps these cache rows (C',), and these images if given, in this order."""
        for cache in (*self.unimodal, *self.multimodal):
            cache.select(rows)
        if self.last_ids is not None:
            self.last_ids = self.last_ids.unflatten(0, (-1, self.texts_per_row))[rows].flatten(0, 1)
        if self.seen is not None:
            self.seen = self.seen[rows]
        if self.hidden is not None:
            self.hidden = self.hidden[rows]
        if images is not None:
            self.images = select_images(self.images, images)

    def share_rows(self, texts_per_row: int) -> None:
        """From now on this many texts go on from what each cache row holds, and write into it side by side."""
        assert self.seen is None, "the rows are shared already"
        assert self.last_ids is not None, "there is no prompt"
        _, rows, _, capacity, _ = self.memory.shape
        self.texts_per_row = texts_per_row
        self.seen = torch.zeros(rows, texts_per_row, capacity, dtype=torch.bool, device=self.memory.device)
        self.seen[:, :, : self.num_entries] = True
        self.last_ids = self.last_ids.repeat_interleave(texts_per_row, dim=0)

    def reorder(self, parents: Tensor) -> None:
        """Text r goes on from text parents[r] (R,) of the same row; the caches stay as they are."""
        assert self.seen is not None, "only texts that share rows can be reordered"
        assert self.last_ids is not None, "there is no prompt"
        self.seen = self.seen.flatten(0, 1).index_select(0, parents).view_as(self.seen)
        self.last_ids = self.last_ids.index_select(0, parents)

    def begin(self, token_ids: Tensor, compat: Compat, width: int | None = None) -> tuple[NextWords, NextWords]:
        """Adds the next words (R, T) of each text; returns them as the two halves of the decoder are to take them.

        width: how many entries the masks have, where texts share rows (default: as many as are filled then).
        """
        num_texts, num_words = token_ids.shape
        start, end = self.num_entries, self.num_entries + num_words * self.texts_per_row
        assert end <= self.unimodal[0].memory.shape[3], "the caches are full"
        visible = None
        if self.seen is not None:
            assert num_words == 1, "texts that share rows go on word by word"
            self.seen[:, :, start:end] = torch.eye(self.texts_per_row, dtype=torch.bool, device=self.seen.device)
            visible = self.seen[:, :, : width or end]
        shown = visible if self.hidden is None else self._hide(self.hidden, token_ids, compat, visible)
        self.last_ids = token_ids[:, -1:]
        positions = torch.arange(self.num_words, self.num_words + num_words, device=token_ids.device).repeat(num_texts)
        self.num_words, self.num_entries = self.num_words + num_words, end
        words = NextWords(positions, slice(start, end), visible, causal=visible is None)
        return words._replace(visible=shown), words

    def _hide(self, hidden: Tensor, token_ids: Tensor, compat: Compat, visible: Tensor | None) -> Tensor:
        """What unimodal attention sees: of what is visible, all but what `Compat.text_hidden_id` hides."""
        before = token_ids[:, :1] if self.last_ids is None else self.last_ids
        hides = hidden_words(compat, token_ids, torch.cat((before, token_ids[:, :-1]), dim=1))
        if self.last_ids is None:
            hides[:, 0] = False
        end = self.num_entries + token_ids.shape[1] * self.texts_per_row
        hidden[:, self.num_entries : end] = hides.view(hidden.shape[0], -1)
        if visible is None:
            return ~hidden[:, :end]
        return visible & ~hidden[:, None, : visible.shape[2]]


def hidden_words(compat: Compat, token_ids: Tensor, previous_ids: Tensor) -> Tensor:
    """Which words unimodal attention does not see for `Compat.text_hidden_id`, given the words before them."""
    return (previous_ids if compat.text_hide_next else token_ids) == compat.text_hidden_id
