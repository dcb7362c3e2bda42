"""Decoding word by word: what is kept from step to step, so that each step computes the new words alone.

Texts of one image may share a cache row (beams): what they wrote lies there side by side, in the order in which it
was written, and a mask says which entries each of them sees. Beams then change places, or go on from one parent, by
the mask alone: no keys or values are moved, and what several texts have in common is there once.

Letters: I images, R texts (consecutive ones share an image), T new words of each, C cache rows, P texts of a row,
N cache entries, D width, E embed_dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opencoca.generation.decoding.arena import DecodingArena
from opencoca.generation.decoding.cache import KeyValueCache
from opencoca.generation.decoding.image_memory import ImageMemories, cache_like, num_images, remember, select_images
from opencoca.model.coca import CoCa
from opencoca.model.config import BlockConfig
from opencoca.model.layers.attention import WordCache
from opencoca.model.layers.layout import TextLayout
from opencoca.model.text_decoder import UnimodalDecoder, Words

Sight = tuple[Tensor | None, Tensor | None]
"""What the new words see of the cache entries in the unimodal and in the multimodal half; None = all."""


@dataclass
class DecodingState:
    """What cached decoding carries from word to word: what it keeps of the images, and the words' caches.

    num_words: how many words of each text there are; texts_per_row: P.
    seen (C, P, capacity): the entries that hold each text's words, where P > 1.
    hidden (C, capacity): entries that unimodal attention does not see, where P > 1 (`Compat.text_hidden_id`).
    last_ids (R, 1): the last word of each text. arena: where images and caches lie, if they have a place.
    """

    images: ImageMemories
    unimodal: list[KeyValueCache]
    multimodal: list[KeyValueCache]
    num_words: int = 0
    texts_per_row: int = 1
    seen: Tensor | None = None
    hidden: Tensor | None = None
    last_ids: Tensor | None = None
    arena: DecodingArena | None = None

    @property
    def num_entries(self) -> int:
        """How many entries of the caches are filled."""
        return self.unimodal[0].length

    @property
    def rows_per_image(self) -> int:
        """How many cache rows belong to each image."""
        return self.unimodal[0].keys.shape[0] // num_images(self.images)

    def entries_of_texts(self) -> Tensor:
        """(R, capacity): which cache entries hold the words of each text."""
        if self.seen is not None:
            return self.seen.flatten(0, 1)
        rows, _, capacity, _ = self.unimodal[0].keys.shape
        entries = torch.arange(capacity, device=self.unimodal[0].keys.device)
        return (entries < self.num_entries).expand(rows, -1)

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
        if images is not None and self.arena is not None:
            self.images = self.arena.select_images(images, num_images(self.images))
        elif images is not None:
            self.images = select_images(self.images, images)

    def share_rows(self, texts_per_row: int) -> None:
        """From now on this many texts go on from what each cache row holds, and write into it side by side."""
        assert self.texts_per_row == 1, "the rows are shared already"
        rows, _, capacity, _ = self.unimodal[0].keys.shape
        self.texts_per_row = texts_per_row
        device = self.unimodal[0].keys.device
        self.seen = torch.zeros(rows, texts_per_row, capacity, dtype=torch.bool, device=device)
        self.seen[:, :, : self.num_entries] = True
        if self.unimodal[0].visible is not None:
            self.hidden = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
            self.hidden[:, : self.num_entries] = ~self.unimodal[0].visible[:, : self.num_entries]
        assert self.last_ids is not None, "there is no prompt"
        self.last_ids = self.last_ids.repeat_interleave(texts_per_row, dim=0)
        for cache in (*self.unimodal, *self.multimodal):
            cache.texts_per_row = texts_per_row

    def reorder(self, parents: Tensor) -> None:
        """Text r goes on from text parents[r] (R,) of the same row; the caches stay as they are."""
        assert self.seen is not None, "only texts that share rows can be reordered"
        assert self.last_ids is not None, "there is no prompt"
        self.seen = self.seen.flatten(0, 1).index_select(0, parents).view_as(self.seen)
        self.last_ids = self.last_ids.index_select(0, parents)

    def begin_words(self, token_ids: Tensor, decoder: UnimodalDecoder, width: int | None = None) -> Sight:
        """Makes room for the next words (R, T) of each text; returns what they see.

        width: of how many entries, where texts share rows: (C, P, width) each; default: of those that are filled then.
        """
        if self.seen is None:
            self.last_ids = token_ids[:, -1:]
            return _visible_in_cache(decoder, token_ids, self.unimodal[0]), None
        assert token_ids.shape[1] == 1, "texts that share rows go on word by word"
        assert self.last_ids is not None, "there is no prompt"
        start, end = self.num_entries, self.num_entries + self.texts_per_row
        self.seen[:, :, start:end] = torch.eye(self.texts_per_row, dtype=torch.bool, device=self.seen.device)
        visible = self.seen[:, :, : width or end]
        hides = decoder.hides(token_ids, self.last_ids)
        self.last_ids = token_ids
        if self.hidden is None or hides is None:
            return visible, visible
        self.hidden[:, start:end] = hides.view(-1, self.texts_per_row)
        return visible & ~self.hidden[:, None, : width or end], visible


def _visible_in_cache(decoder: UnimodalDecoder, token_ids: Tensor, cache: KeyValueCache) -> Tensor | None:
    """(B, N) what the next words token_ids (B, T) may see of themselves and of those before them; None = all."""
    if decoder.hidden_id is None:
        return None
    batch_size, _, capacity, _ = cache.keys.shape
    if cache.visible is None:
        cache.visible = torch.ones(batch_size, capacity, dtype=torch.bool, device=token_ids.device)
    end = cache.length + token_ids.shape[1]
    decided = cache.visible[:, cache.length + decoder.hide_next : end + decoder.hide_next]
    decided.copy_((token_ids != decoder.hidden_id)[:, : decided.shape[1]])
    cache.visible[:, 0] = True
    return cache.visible[:, :end]


def start_decoding(
    model: CoCa,
    image_tokens: Tensor,
    texts_per_image: int = 1,
    capacity: int | None = None,
    num_entries: int | None = None,
    words_per_image: int | None = None,
    arena: DecodingArena | None = None,
) -> DecodingState:
    """A state without words for I x texts_per_image texts; image_tokens (I, Q, D).

    capacity: the most words that a text will have (default: context_length); num_entries: how many the caches
    hold, where texts will share their rows (default: capacity); words_per_image: about how many words all texts
    of an image will have together, by which the cheaper form of cross-attention is chosen (default: keys and
    values); arena: where it is to lie, if it has a place.
    Raises ValueError if capacity is more than context_length.
    """
    num_rows = image_tokens.shape[0] * texts_per_image
    text = model.config.text
    capacity = text.context_length if capacity is None else capacity
    if not 0 < capacity <= text.context_length:
        # Beyond it a learned position is missing, and the row after the last belongs to [CLS].
        raise ValueError(f"capacity {capacity} must be from 1 to context_length {text.context_length}")
    entries = num_entries or capacity
    images = remember(image_tokens, model.multimodal_decoder.cross_blocks(), words_per_image, arena)
    if arena is not None:
        return DecodingState(images, *arena.new_caches(num_rows, entries), arena=arena)

    def caches(depth: int, block: BlockConfig) -> list[KeyValueCache]:
        return [KeyValueCache(num_rows, block, entries, like) for _ in range(depth)]

    like = cache_like(images)
    return DecodingState(
        images,
        caches(text.unimodal_depth, model.config.unimodal_block()),
        caches(text.multimodal_depth, model.config.multimodal_block()),
    )


def decode_step(model: CoCa, token_ids: Tensor, state: DecodingState) -> Tensor:
    """token_ids (R, T): the next words of each text -> logits (R, V) after the last of them; extends the state."""
    sight = state.begin_words(token_ids, model.unimodal_decoder)
    num_texts, num_words = token_ids.shape
    layout = TextLayout.dense(num_texts, num_words, token_ids.device, state.num_words)
    logits = next_logits(model, token_ids, layout, sight, state.images, (state.unimodal, state.multimodal))
    state.num_words += num_words
    return logits


def next_logits(
    model: CoCa,
    token_ids: Tensor,
    layout: TextLayout,
    sight: Sight,
    images: ImageMemories,
    caches: tuple[Sequence[WordCache], Sequence[WordCache]],
) -> Tensor:
    """token_ids (R, T) -> logits (R, V) after the last of them; extends the caches of both halves."""
    states = model.unimodal_decoder.step(token_ids, caches[0], replace(layout, visible=sight[0]))
    hidden = model.multimodal_decoder(Words(states, replace(layout, visible=sight[1])), images, caches[1])
    return model.lm_head(layout.pad(hidden)[:, -1])


def embed_decoded(
    model: CoCa, state: DecodingState, rows: Tensor, seen: Tensor, texts: Sequence[Sequence[int]], eos_id: int
) -> Tensor:
    """text_embed (C', P', E) of texts whose words, all but the last, are in the caches; the state stays as it is.

    rows (C',): the cache rows; seen (C', P', N): which of their entries hold each text's words; texts: the token ids
    of all C' x P' texts. One that has no end token is closed by one, in place of its last word if there is no room.
    Computes the last word, the end token and [CLS] of each text, in the unimodal half alone.
    """
    decoder = model.unimodal_decoder
    num_rows, per_row, _ = seen.shape
    closing = _Closing.of(texts, eos_id, decoder, seen.device)
    num_slots = closing.token_ids.shape[1]
    x = decoder.embed_words_and_cls(closing.token_ids, closing.positions)
    entries = state.num_entries
    # A text sees its own words, and of its closing words those before it that are there.
    hidden = state.hidden if state.hidden is not None else _hidden_in_rows(state)
    in_cache = seen[:, :, :entries] if hidden is None else seen[:, :, :entries] & ~hidden[rows, None, :entries]
    before = torch.ones(num_slots, num_slots, dtype=torch.bool, device=seen.device).tril()
    itself = torch.eye(num_slots, dtype=torch.bool, device=seen.device)
    in_closing = (before & closing.visible[:, None]) | (itself & ~closing.used[:, :, None])
    same_text = torch.eye(per_row, dtype=torch.bool, device=seen.device)
    in_closing = in_closing.view(num_rows, per_row, num_slots, 1, num_slots) & same_text[:, None, :, None]
    visible = torch.cat(
        (in_cache.repeat_interleave(num_slots, dim=1), in_closing.reshape(num_rows, per_row * num_slots, -1)), dim=2
    )
    layout = TextLayout(num_rows * per_row, num_slots, None, closing.positions.flatten(), visible)
    for block, cache in zip(decoder.blocks, state.unimodal, strict=True):
        branch = cache.branch(rows, per_row, extra=per_row * num_slots)
        x = block.self_attend(x, layout, branch)  # pyright: ignore[reportCallIssue]
    cls = decoder.norm(x.view(num_rows, per_row, num_slots, -1)[:, :, -1])
    return model.project_text(cls)


def _hidden_in_rows(state: DecodingState) -> Tensor | None:
    visible = state.unimodal[0].visible
    return None if visible is None else ~visible


@dataclass(frozen=True)
class _Closing:
    """What follows the cached words of each text, (B, T) each, T = 3 or 4: a last word, the end token, what
    `Compat.text_hide_next` puts behind it, [CLS] (any id). used: whether there is such a word; visible: whether
    attention sees it."""

    token_ids: Tensor
    positions: Tensor
    used: Tensor
    visible: Tensor

    @staticmethod
    def of(texts: Sequence[Sequence[int]], eos_id: int, decoder: UnimodalDecoder, device: torch.device) -> "_Closing":
        ids, places, used, before = [], [], [], []
        for text in texts:
            body = [*text[:-1]] if text[-1] == eos_id else [*text][: decoder.context_length - 1]
            num_cached = len(text) - 1
            extra = len(body) > num_cached
            has_room = decoder.hide_next and len(body) + 1 < decoder.context_length
            pad = decoder.hidden_id if decoder.hidden_id is not None else eos_id
            end = len(body)
            ids.append([body[-1] if extra else eos_id, eos_id, pad, eos_id])
            places.append([end - 1 if extra else end, end, end + has_room, end + 1 + has_room])
            used.append([extra, True, has_room, True])
            before.append([body[num_cached - 1] if extra else eos_id, body[-1], eos_id, pad if has_room else eos_id])
        # The third is there for hide_next only.
        kept = [0, 1, 2, 3] if decoder.hide_next else [0, 1, 3]
        token_ids, positions, is_used, previous = (
            torch.tensor(x, device=device)[:, kept] for x in (ids, places, used, before)
        )
        hides = decoder.hides(token_ids, previous)
        return _Closing(token_ids, positions, is_used, is_used if hides is None else is_used & ~hides)
