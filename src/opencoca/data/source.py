"""A sample, and the interface of all sources of samples.

A new kind of data (another table, another archive) is one more `SampleSource`: a length, a key and `read`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from opencoca.data.targets import Target


class Sample(NamedTuple):
    """One sample as a source gives it.

    Attributes:
        images: encoded; one, or several (a pair, the frames of a clip in order).
        texts: captions; or the question, hypothesis or sentence. Stripped, none of them blank.
        target: the name of a class, or answers with weights.
    """

    images: tuple[bytes, ...]
    texts: tuple[str, ...] = ()
    target: Target | None = None


class Place(NamedTuple):
    """The file (path or URL) that holds an image, and from which byte on."""

    file: str
    offset: int


class BadSample(NamedTuple):
    """A sample that can't be used: its key, the file (path or URL) and byte where it begins, and the reason.

    A key "" stands for damage of the file that isn't known to concern a certain sample.
    """

    key: str
    file: str
    offset: int
    reason: str


class SampleSource(ABC):
    """Samples in a fixed order, with random access: images, any number of captions, and a target where there is one.

    Safe to read from several threads and processes at once.

    Attributes:
        missing_images: keys of images that were named but don't exist; they have no index.
        blank_captions: the key of an image once for each blank caption it had; `read` leaves blank ones out.
        captions_in_memory: whether `captions` costs nothing; else `read` gives them with the image.
        is_remote: whether reading takes long enough to do it in many threads.
        lost: samples that files name but can't give; they have no index.
        block_starts: indices at which runs of samples begin that are read best together; None if it doesn't matter.
    """

    missing_images: tuple[str, ...] = ()
    blank_captions: tuple[str, ...] = ()
    lost: tuple[BadSample, ...] = ()
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
    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        """The parts of a sample that are asked for; it may hold others too.

        Raises OSError or ImageError for images that can't be read, and ValueError for captions that aren't text and
        targets that can't be used.
        """

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample; empty if it has none."""
        return self.read(index, images=False, target=False).texts

    def target(self, index: int) -> Target | None:
        """The target of a sample; None if it has none."""
        return self.read(index, images=False, texts=False).target

    def open_bytes(self, index: int) -> bytes:
        """The encoded bytes of a sample's image, the first of several."""
        return self.read(index, texts=False, target=False).images[0]

    def place(self, index: int) -> Place:
        """Returns the place of a sample's image, for messages."""
        return Place(self.key(index), 0)

    def draw_texts(self, index: int, sample: Sample, wanted: int, bits: np.random.PCG64) -> list[str] | None:
        """Makes `wanted` texts, or none, out of a sample that `read` gave; other ones at each visit.

        Returns None if the sample's own captions are to be shown.
        """
        return None


class SourceView(SampleSource):
    """A source whose samples are those of other sources, under indices of its own."""

    @abstractmethod
    def locate(self, index: int) -> tuple[SampleSource, int]:
        """Returns the source that a sample belongs to, and its index there."""

    def key(self, index: int) -> str:
        source, inner = self.locate(index)
        return source.key(inner)

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        source, inner = self.locate(index)
        return source.read(inner, images=images, texts=texts, target=target)

    def place(self, index: int) -> Place:
        source, inner = self.locate(index)
        return source.place(inner)

    def draw_texts(self, index: int, sample: Sample, wanted: int, bits: np.random.PCG64) -> list[str] | None:
        source, inner = self.locate(index)
        return source.draw_texts(inner, sample, wanted, bits)
