"""Decoding steps that are recorded once and replayed: CUDA graphs.

A step of few texts is hundreds of small kernels, and starting them from Python takes longer than they run. A recorded
step starts as one. Its shapes and the memory that it reads are always the same: decoding lies in a `DecodingArena`, and
there is a step for each power of two of images and of cache entries; what is too many is computed and not looked at.

A step is used only if its first replay gave what the unrecorded step gives. Where recording fails, decoding goes on
without, and a warning says so.

Letters: I images, Q image tokens, D width, C cache rows, P texts of a row, R = C P texts, W entries, V vocabulary.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from opencoca.generation.decoding.arena import ArenaSize, DecodingArena, Window
from opencoca.generation.decoding.image_memory import ImageMemories, num_images
from opencoca.generation.decoding.state import DecodingState, Sight, decode_step, next_logits
from opencoca.model.coca import CoCa
from opencoca.model.layers.layout import TextLayout

# Steps of more texts keep a GPU busy for longer than they take to start.
_MOST_TEXTS = 1024
# Of the device's memory, for an arena: it stays between calls.
_MOST_MEMORY = 1 / 8
_FEWEST_ENTRIES = 32
_MOST_STEPS = 64
# Between a step recorded and not recorded, relative to the largest logit: other kernels may be chosen.
_TOLERANCE = 2e-2

Replay = Callable[[], Tensor]


class Recorder(Protocol):
    """Records what a function does to tensors that are there; what it returns does that again to the same tensors.

    memory: of the device, in bytes.
    """

    memory: float

    def __call__(self, function: Callable[[], Tensor]) -> Replay: ...


class CudaRecorder:
    """Records CUDA graphs; those of one recorder share the memory of what is between their kernels."""

    def __init__(self, device: torch.device):
        self.device = device
        self.memory = torch.cuda.get_device_properties(device).total_memory
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        """Raises RuntimeError if the function cannot be recorded, or its replay gives something else."""
        with torch.cuda.device(self.device):
            stream, usual_stream = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(usual_stream)
            with torch.cuda.stream(stream):
                expected = function().clone()  # and whatever libraries do in their first call only
            usual_stream.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on using the device: they read images ahead.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    output = function()
            finally:
                torch.cuda.set_stream(usual_stream)  # which a recording that fails does not do

        def replay() -> Tensor:
            with torch.cuda.device(self.device):
                graph.replay()
            return output

        difference = (replay() - expected).abs().amax()
        if bool(difference > _TOLERANCE * expected.abs().amax()):
            raise RuntimeError(f"a replayed step's logits differ by {float(difference):.3g}")
        return replay


_RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
_graphs: "WeakKeyDictionary[CoCa, DecodingGraphs]" = WeakKeyDictionary()


@contextmanager
def borrow_graphs(
    model: CoCa, image_tokens: Tensor, rows_per_image: int, entries: int, texts_per_image: int
) -> "Iterator[DecodingGraphs | None]":
    """The model's recorded steps, for one search alone, over image_tokens (I, Q, D); None where there are none.

    rows_per_image: cache rows; entries: of each row. There are none without CUDA, for a model whose ``records_steps``
    is False, under autocast, for very many texts, for modules with hooks (a recorded step does not call them), and
    while another thread uses them.
    """
    device, count = image_tokens.device, image_tokens.shape[0]
    if device.type not in _RECORDERS:
        _graphs.pop(model, None)  # whoever takes a model off a GPU wants its memory back
        yield None
        return
    recordable = model.records_steps and 0 < count * texts_per_image <= _MOST_TEXTS
    if not recordable or torch.is_autocast_enabled(device.type) or _has_hooks(model):
        yield None
        return
    graphs = _graphs.setdefault(model, DecodingGraphs())
    if not graphs.lock.acquire(blocking=False):
        yield None
        return
    try:
        images = _power_of_two(count)
        size = ArenaSize(images, images * rows_per_image, entries, image_tokens.shape[1])
        yield graphs if graphs.prepare(model, size, image_tokens) else None
    finally:
        graphs.lock.release()


class DecodingGraphs:
    """The arena and the recorded steps of one model."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._recorder: Recorder | None = None
        self._arena: DecodingArena | None = None
        self._steps: dict[_Shape, _Step] = {}
        self._weights: list[tuple[object, ...]] = []
        self._failed = False

    @property
    def arena(self) -> DecodingArena:
        """Where the search that has borrowed these graphs decodes."""
        assert self._arena is not None, "not prepared"
        return self._arena

    def prepare(self, model: CoCa, size: ArenaSize, like: Tensor) -> bool:
        """Makes sure that there is an arena of this size, of tensors like this; False if steps cannot be recorded."""
        weights = _places_of_weights(model)
        if self._weights != weights:  # steps read them where they were
            self._weights, self._failed, self._recorder = weights, False, None
            self._forget()
        self._recorder = self._recorder or _RECORDERS[like.device.type](like.device)
        most_memory = _MOST_MEMORY * self._recorder.memory
        if self._failed or size.num_bytes(model, like.dtype) > most_memory:
            return False
        if self._arena is None or not self._arena.serves(size, like):
            both = size if self._arena is None else size.joined(self._arena.size)
            self._forget()
            self._arena = DecodingArena(model, both if both.num_bytes(model, like.dtype) <= most_memory else size, like)
        return True

    def _forget(self) -> None:
        self._steps.clear()
        self._arena = None

    def step(self, model: CoCa, token_ids: Tensor, state: DecodingState) -> Tensor:
        """As `decode_step`: one word (R, 1) of texts that share rows in the arena -> logits (R, V).

        The next step overwrites the logits.
        """
        if self._failed:
            return decode_step(model, token_ids, state)
        last_ids, shape = state.last_ids, _Shape.of(state)
        sight = state.begin_words(token_ids, model.unimodal_decoder, shape.entries)
        step = self._steps.get(shape) or _Step(self.arena, shape)
        step.set(token_ids, sight, state.num_words, state.num_entries)
        if shape not in self._steps:
            assert self._recorder is not None, "not prepared"
            try:
                step.record(model, self._recorder)
            except RuntimeError as error:
                warnings.warn(f"decoding goes on without CUDA graphs: {error}", stacklevel=2)
                self._failed, state.last_ids = True, last_ids
                return decode_step(model, token_ids, state)
            if len(self._steps) >= _MOST_STEPS:
                self._steps.clear()
            self._steps[shape] = step
        logits = step.replay()[: token_ids.shape[0]]
        for cache in (*state.unimodal, *state.multimodal):
            cache.length += state.texts_per_row
        state.num_words += 1
        return logits


class _Shape(NamedTuple):
    images: int
    rows: int
    texts_per_row: int
    entries: int

    @staticmethod
    def of(state: DecodingState) -> "_Shape":
        """Of the step that comes next."""
        images = _power_of_two(num_images(state.images))
        needed = state.num_entries + state.texts_per_row
        entries = min(max(_FEWEST_ENTRIES, _power_of_two(needed)), state.unimodal[0].keys.shape[2])
        return _Shape(images, images * state.rows_per_image, state.texts_per_row, entries)


class _Step:
    """A step over the first rows of an arena, and the tensors that it takes what is new from."""

    replay: Replay

    def __init__(self, arena: DecodingArena, shape: _Shape):
        device, num_texts = arena.device, shape.rows * shape.texts_per_row
        self.token_ids = torch.zeros(num_texts, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(num_texts, dtype=torch.int64, device=device)
        self.places = torch.arange(shape.texts_per_row, device=device)
        # Rows of no text must see something too, or they would become no number.
        mask = torch.ones(shape.rows, shape.texts_per_row, shape.entries, dtype=torch.bool, device=device)
        self.sight = mask, mask.clone()
        self._arena, self._shape = arena, shape

    def set(self, token_ids: Tensor, sight: Sight, num_words: int, num_entries: int) -> None:
        """What the next run is of; sight (C, P, W) of the rows that there are."""
        self.token_ids[: token_ids.shape[0]] = token_ids
        self.positions.fill_(num_words)
        torch.arange(num_entries, num_entries + len(self.places), out=self.places)
        for mask, visible in zip(self.sight, sight, strict=True):
            assert visible is not None, "the texts share no rows"
            mask[: visible.shape[0]] = visible

    def record(self, model: CoCa, recorder: Recorder) -> None:
        """Makes `replay`, which gives logits (rows x P, V)."""
        arena, shape = self._arena, self._shape
        layout = TextLayout(self.token_ids.shape[0], 1, None, self.positions)
        images: ImageMemories = [(memory[0, : shape.images], memory[1, : shape.images]) for memory in arena.images]
        unimodal, multimodal = (
            [Window(memory, shape.rows, shape.entries, self.places) for memory in memories]
            for memories in (arena.unimodal, arena.multimodal)
        )
        self.replay = recorder(
            lambda: next_logits(model, self.token_ids, layout, self.sight, images, (unimodal, multimodal))
        )


def _places_of_weights(model: CoCa) -> list[tuple[object, ...]]:
    """Where the decoder's weights lie, and as what."""
    modules = (model.unimodal_decoder, model.multimodal_decoder, model.lm_head)
    tensors = chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    return [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


def _has_hooks(model: CoCa) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _power_of_two(number: int) -> int:
    """The least that is not smaller than number."""
    return 1 << (number - 1).bit_length()
