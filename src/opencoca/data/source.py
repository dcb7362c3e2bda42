"""The interface of all sources of samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from opencoca.data.shards import LostSample
from opencoca.data.targets import Target


class Sample(NamedTuple):
    """What a source gives of one sample.

    Attributes:
        images: encoded; one, or several (a pair, the frames of a clip in order).
        texts: captions; or the question, hypothesis or sentence.
        target: the name of a class, or answers with weights.
    """

    images: tuple[bytes, ...]
    texts: tuple[str, ...] = ()
    target: Target | None = None


class Place(NamedTuple):
    """The file (path or URL) that holds an image, and from which byte on."""

    file: str
    offset: int


class SampleSource(ABC):
    """Samples in a fixed order, with random access: images, any number of captions, and a target where there is one.

    Safe to read from several threads and processes at once.

    Attributes:
        missing_images: keys of images that were named but don't exist; they have no index.
        blank_captions: the key of an image once per blank caption it had; `captions` leaves blank ones out.
        captions_in_memory: whether `captions` costs nothing; else `read` gives them with the image.
        is_remote: whether reading takes long enough to do it in many threads.
        lost: (file, sample) of samples that files name but can't give; they have no index.
        block_starts: indices at which runs of samples begin that are read best together; None if it doesn't matter.
    """

    missing_images: tuple[str, ...] = ()
    blank_captions: tuple[str, ...] = ()
    lost: tuple[tuple[str, LostSample], ...] = ()
    captions_in_memory: bool = True
    is_remote: bool = False
    block_starts: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def key(self, index: int) -> str:
        """The unique name of a sample: its image's path relative to the folder, or its key in the shards."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample, stripped, none of them blank; empty if it has none."""

    @abstractmethod
    def open_bytes(self, index: int) -> bytes:
        """The encoded bytes of a sample's image, the first of several. Raises OSError if they can't be read."""

    def open_images(self, index: int) -> tuple[bytes, ...]:
        """The encoded bytes of all images of a sample. Raises OSError if they can't be read."""
        return (self.open_bytes(index),)

    def target(self, index: int) -> Target | None:
        """The target of a sample; None if it has none. Raises ValueError for one that can't be used."""
        return None

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        """The parts of a sample that are asked for, at once; it may hold others too.

        Raises as `open_bytes` does, and ValueError for captions that aren't text and targets that can't be used.
        """
        return Sample(
            self.open_images(index) if images else (),
            self.captions(index) if texts else (),
            self.target(index) if target else None,
        )

    def place(self, index: int) -> Place:
        """Where an image lies, for messages."""
        return Place(self.key(index), 0)

    def draw_texts(self, index: int, sample: Sample, wanted: int, bits: np.random.PCG64) -> list[str] | None:
        """Texts made up anew at each visit out of what `read` gave, `wanted` of them or none.

        None where the captions themselves are shown.
        """
        return None
