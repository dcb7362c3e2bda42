"""Decoding steps that are recorded once and replayed: CUDA graphs.

A step of few texts is hundreds of small kernels, and starting them from Python takes longer than they run. A recorded
step starts as one. Its shapes and the memory that it reads are always the same: decoding lies in a `DecodingArena`, and
there is a step for each power of two of images and of cache entries; what is too many is computed and not looked at.

A step is used only if its first replay gave what the unrecorded step gives. Where recording fails, decoding goes on
without, and a warning says so.

Letters: I images, Q image tokens, D width, C cache rows, P texts of a row, R = C P texts, W entries, V vocabulary.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from opencoca.generation.decoding.arena import ArenaSize, DecodingArena
from opencoca.generation.decoding.state import DecodingState, ImageKeysValues, WordCache, num_images
from opencoca.model.coca import CoCa
from opencoca.model.layers.attention import NextWords
from opencoca.system.notice import Notice

# Steps of more texts keep a GPU busy for longer than they take to start.
_MOST_TEXTS = 1024
# The share of the device's memory that an arena may take; it stays between calls.
_MOST_MEMORY = 1 / 8
_FEWEST_ENTRIES = 32
_MOST_STEPS = 64
# How much the logits of a recorded step may differ, relative to the largest: other kernels may be chosen for it.
_TOLERANCE = 2e-2

Replay = Callable[[], Tensor]


class CudaRecorder:
    """Records what a function does to tensors that are there, as a CUDA graph; what it returns does that again to them.

    The graphs of one recorder share the memory of their intermediate results. memory: the device's, in bytes.
    """

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
            except RuntimeError:
                torch.cuda.set_stream(usual_stream)  # which a recording that fails does not do
                self._tidy_up()
                raise

        def replay() -> Tensor:
            with torch.cuda.device(self.device):
                graph.replay()
            return output

        difference = (replay() - expected).abs().amax()
        if bool(difference > _TOLERANCE * expected.abs().amax()):
            raise RuntimeError(f"a replayed step's logits differ by {float(difference):.3g}")
        return replay

    def _tidy_up(self) -> None:
        """Ends what a recording that failed has left open, so that others can follow.

        Up to PyTorch 2.12 memory is still being given out from the recording's pool, and the generator of random
        numbers still believes that it is recorded. The first is ended here; a short recording that succeeds, into a
        new pool, ends the second.
        """
        with suppress(RuntimeError):  # where PyTorch has ended it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), self._pool, stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=self.device)


RECORDERS: dict[str, Callable[[torch.device], CudaRecorder]] = {"cuda": CudaRecorder}


def can_record(model: CoCa, device: torch.device, num_texts: int) -> bool:
    """Whether steps of so many texts can be recorded and are worth it."""
    has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return 0 < num_texts <= _MOST_TEXTS and not torch.is_autocast_enabled(device.type) and not has_hooks


class DecodingGraphs:
    """The arena and the recorded steps of one model."""

    def __init__(self, model: CoCa) -> None:
        self.model = model
        self._recorder: CudaRecorder | None = None
        self._arena: DecodingArena | None = None
        self._steps: dict[_Shape, _Step] = {}
        self._weights: list[tuple[object, ...]] = []
        self._failed = False

    @property
    def arena(self) -> DecodingArena:
        """Where the search that has these graphs decodes."""
        assert self._arena is not None, "not prepared"
        return self._arena

    def prepare(self, size: ArenaSize, like: Tensor) -> bool:
        """Makes sure that there is an arena of this size, of tensors like this; False if steps cannot be recorded."""
        weights = _places_of_weights(self.model)
        if self._weights != weights:  # steps read them where they were
            self._weights, self._failed, self._recorder = weights, False, None
            self._forget()
        self._recorder = self._recorder or RECORDERS[like.device.type](like.device)
        if self._failed:
            return False
        if self._arena is not None and self._arena.serves(size, like):
            return True
        sizes = [size] if self._arena is None else [size.joined(self._arena.size), size]
        most_bytes = _MOST_MEMORY * self._recorder.memory
        fitting = [one for one in sizes if one.num_bytes(self.model, like.dtype) <= most_bytes]
        if fitting:
            self._forget()
            self._arena = DecodingArena(self.model, fitting[0], like)
        return bool(fitting)

    def _forget(self) -> None:
        self._steps.clear()
        self._arena = None

    def step(self, token_ids: Tensor, state: DecodingState) -> Tensor:
        """token_ids (R, 1): the next word of texts that share rows in the arena -> logits (R, V).

        The next step overwrites the logits.
        """
        shape = _Shape.of(state)
        words = state.begin(token_ids, self.model.config.compat, shape.entries)
        step = self._steps.get(shape)
        if step is None and not self._failed:
            step = self._record(_Step(self.arena, shape), token_ids, words)
        if step is None:
            shown = (None if part.visible is None else part.visible[:, :, : state.num_entries] for part in words)
            unimodal, multimodal = (part._replace(visible=seen) for part, seen in zip(words, shown, strict=True))
            return self.model.step(token_ids, (unimodal, multimodal), state)
        step.set(token_ids, words)
        return step.replay()[: token_ids.shape[0]]

    def _record(self, step: "_Step", token_ids: Tensor, words: tuple[NextWords, NextWords]) -> "_Step | None":
        """The step, recorded with these words and kept; None if that fails."""
        assert self._recorder is not None, "not prepared"
        step.set(token_ids, words)
        try:
            step.record(self.model, self._recorder)
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without CUDA graphs: {error}", Notice, stacklevel=2)
            self._failed = True
            return None
        if len(self._steps) >= _MOST_STEPS:
            self._steps.clear()
        self._steps[step.shape] = step
        return step


class _Shape(NamedTuple):
    images: int
    rows: int
    texts_per_row: int
    entries: int

    @staticmethod
    def of(state: DecodingState) -> "_Shape":
        """The shape of the step that comes next."""
        images = power_of_two(num_images(state.images))
        needed = state.num_entries + state.texts_per_row
        entries = min(max(_FEWEST_ENTRIES, power_of_two(needed)), state.memory.shape[3])
        return _Shape(images, images * state.rows_per_image, state.texts_per_row, entries)


class _Step:
    """A step over the first rows of an arena, and the tensors that it takes what is new from."""

    replay: Replay

    def __init__(self, arena: DecodingArena, shape: _Shape):
        self.shape, self._arena = shape, arena
        device, num_texts = arena.device, shape.rows * shape.texts_per_row
        self.token_ids = torch.zeros(num_texts, 1, dtype=torch.int64, device=device)
        positions = torch.zeros(num_texts, dtype=torch.int64, device=device)
        places = torch.arange(shape.texts_per_row, device=device)
        # Rows of no text must see something too, or they would become no number.
        mask = torch.ones(shape.rows, shape.texts_per_row, shape.entries, dtype=torch.bool, device=device)
        self.words = NextWords(positions, places, mask), NextWords(positions, places, mask.clone())

    def set(self, token_ids: Tensor, words: tuple[NextWords, NextWords]) -> None:
        """Takes the next words for the next replay; they see entries (C, P, W) of the rows that there are."""
        self.token_ids[: token_ids.shape[0]] = token_ids
        for own, new in zip(self.words, words, strict=True):
            assert isinstance(own.places, Tensor)
            assert isinstance(new.places, slice)
            assert own.visible is not None
            assert new.visible is not None, "the texts share no rows"
            own.visible[: new.visible.shape[0]] = new.visible
            own.positions[: new.positions.shape[0]] = new.positions
            torch.arange(new.places.start, new.places.stop, out=own.places)

    def record(self, model: CoCa, recorder: CudaRecorder) -> None:
        """Makes `replay`, which gives logits (rows x P, V)."""
        arena, (images, rows, _, entries) = self._arena, self.shape
        state = DecodingState(
            [ImageKeysValues(memory[:, :images]) for memory in arena.images],
            [WordCache(memory[:, :rows, :, :entries]) for memory in arena.unimodal],
            [WordCache(memory[:, :rows, :, :entries]) for memory in arena.multimodal],
        )
        self.replay = recorder(lambda: model.step(self.token_ids, self.words, state))


def _places_of_weights(model: CoCa) -> list[tuple[object, ...]]:
    """The address, type and layout of each weight of the decoder."""
    tensors = chain.from_iterable((*module.parameters(), *module.buffers()) for module in model.decoder_modules())
    return [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


def power_of_two(number: int) -> int:
    """The least power of two that is at least number."""
    return 1 << (number - 1).bit_length()
