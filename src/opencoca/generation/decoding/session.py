"""A session of decoding: all that is kept for a network from one search to the next.

Letters: I images, Q image tokens, D width, R texts, T next words of each, V vocabulary.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opencoca.generation.decoding.arena import ArenaSize
from opencoca.generation.decoding.graphs import RECORDERS, DecodingGraphs, can_record, power_of_two
from opencoca.generation.decoding.state import DecodingState, WordCache, remember, words_like
from opencoca.model.coca import CoCa
from opencoca.model.config import BlockConfig
from opencoca.model.kernels.linear import PackedWeight, pack_weights

# Rearranged weights make steps of up to so many texts faster by more than their memory is worth.
_PACK_FOR_TEXTS = 64


@dataclass(frozen=True)
class Room:
    """What decoding needs room for.

    length: the most words that a text may have; texts: the number of texts of each image.
    shared: whether the texts of an image share a cache row, which holds the words of the prompt, prompt_length, once.
    """

    length: int
    texts: int = 1
    shared: bool = False
    prompt_length: int = 1

    @property
    def entries(self) -> int:
        """How many entries a cache row has."""
        return self.prompt_length + (self.texts if self.shared else 1) * (self.length - self.prompt_length)

    @property
    def rows_per_image(self) -> int:
        """How many cache rows an image has."""
        return 1 if self.shared else self.texts


class DecodingSession:
    """Decoding by one network, with all that makes the next search faster: rearranged weights and recorded steps.

    On a CPU, searches of few texts use weights rearranged for them, for as much memory again as the decoder
    (`opencoca.model.kernels.linear`); on a GPU they record their steps as CUDA graphs (`graphs`), if records_steps is
    true. All of that goes with the session, and recorded steps also when the network leaves the GPU. Weights may
    change between two searches. Several threads may use a session: recorded steps serve one of them at a time.
    """

    def __init__(self, model: CoCa, *, records_steps: bool = True):
        self.model, self.records_steps = model, records_steps
        self._packed: list[PackedWeight] = []
        self._graphs: DecodingGraphs | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # What is kept can be neither copied nor saved; a copy makes it anew.
        return partial(DecodingSession, records_steps=self.records_steps), (self.model,)

    def start(self, image_tokens: Tensor, room: Room | None = None) -> DecodingState:
        """A state without words over image_tokens (I, Q, D), with one cache row for each image.

        Room is by default for one text of context_length words. Raises ValueError if a text's length is more than that.
        """
        return self._start(image_tokens, room or Room(self.model.config.text.context_length), None)

    @contextmanager
    def search(self, image_tokens: Tensor, room: Room) -> Iterator[DecodingState]:
        """As `start`, for a search that knows its room beforehand: steps are recorded where that is possible.

        It is not without CUDA, under autocast, for very many texts, for modules with hooks (a recorded step does not
        call them), and while another thread does it.
        """
        alone = self._lock.acquire(blocking=False)
        try:
            self._pack(image_tokens, room)
            yield self._start(image_tokens, room, self._prepared_graphs(image_tokens, room) if alone else None)
        finally:
            if alone:
                self._lock.release()

    def step(self, token_ids: Tensor, state: DecodingState) -> Tensor:
        """token_ids (R, T): the next words of each text -> logits (R, V) after the last of them; extends the state.

        The next step may overwrite the logits.
        """
        if state.recorded is not None and state.seen is not None:
            return state.recorded(token_ids, state)
        return self.model.step(token_ids, state.begin(token_ids, self.model.config.compat), state)

    def _start(self, image_tokens: Tensor, room: Room, graphs: DecodingGraphs | None) -> DecodingState:
        text, rows = self.model.config.text, image_tokens.shape[0]
        if not 0 < room.length <= text.context_length:
            # Beyond it a learned position is missing, and the row after the last belongs to [CLS].
            raise ValueError(f"room for {room.length} words must be from 1 to context_length {text.context_length}")
        homes = None if graphs is None else graphs.arena.images
        images = remember(self.model, image_tokens, room.texts * room.length, homes)

        def new(depth: int, block: BlockConfig) -> list[WordCache]:
            return [WordCache.new(rows, block, room.entries, words_like(images)) for _ in range(depth)]

        if graphs is not None:
            unimodal, multimodal = graphs.arena.new_caches(rows, room.entries)
        else:
            unimodal = new(text.unimodal_depth, self.model.config.unimodal_block())
            multimodal = new(text.multimodal_depth, self.model.config.multimodal_block())
        state = DecodingState(images, unimodal, multimodal, recorded=None if graphs is None else graphs.step)
        if self.model.config.compat.text_hidden_id is not None:
            state.hidden = torch.zeros(rows, room.entries, dtype=torch.bool, device=image_tokens.device)
        return state

    def _pack(self, image_tokens: Tensor, room: Room) -> None:
        if not image_tokens.is_cpu:
            self._packed = []
        elif image_tokens.shape[0] * room.texts <= _PACK_FOR_TEXTS:
            self._packed = pack_weights(*self.model.decoder_modules())

    def _prepared_graphs(self, image_tokens: Tensor, room: Room) -> DecodingGraphs | None:
        """The recorded steps, ready for a search over image_tokens (I, Q, D); None where there are to be none."""
        if image_tokens.device.type not in RECORDERS:
            self._graphs = None  # whoever takes a model off a GPU wants its memory back
            return None
        images = image_tokens.shape[0]
        if not self.records_steps or not can_record(self.model, image_tokens.device, images * room.texts):
            return None
        self._graphs = self._graphs or DecodingGraphs(self.model)
        images = power_of_two(images)
        size = ArenaSize(images, images * room.rows_per_image, room.entries, image_tokens.shape[1])
        return self._graphs if self._graphs.prepare(size, image_tokens) else None
