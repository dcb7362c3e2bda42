"""What decoding carries from word to word, so that each step computes the new words alone.

Texts of one image may share a cache row (beams): what they wrote lies there side by side, in the order in which it
was written, and a mask says which entries each of them sees. Beams then change places, or go on from one parent, by
the mask alone: no keys or values are moved, and what several texts have in common is there once.

Letters: I images, R texts (consecutive ones share an image), T new words of each, C cache rows, P texts of a row,
N cache entries.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opencoca.generation.decoding.cache import WordCache
from opencoca.generation.decoding.image_memory import ImageMemories, num_images, select_images
from opencoca.model.config_parts import Compat
from opencoca.model.layers.attention import NextWords


class Steps(Protocol):
    """Another way to compute the steps that follow the prompt: see `opencoca.generation.decoding.graphs`."""

    def step(self, token_ids: Tensor, state: "DecodingState") -> Tensor: ...


@dataclass
class DecodingState:
    """What is kept of the images and of the words so far.

    num_words: how many words of each text there are; num_entries: how many entries of a cache row they fill.
    texts_per_row: P.
    seen (C, P, capacity): the entries that hold each text's words, where texts share rows.
    hidden (C, capacity): the entries that unimodal attention does not see, for `Compat.text_hidden_id`.
    last_ids (R, 1): the last word of each text. recorded: the recorded steps that this decoding has, if any.
    """

    images: ImageMemories
    unimodal: list[WordCache]
    multimodal: list[WordCache]
    hidden: Tensor | None = None
    recorded: Steps | None = None
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
