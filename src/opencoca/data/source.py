"""The interface of all sources of images and captions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opencoca.data.shards import LostSample


class Sample(NamedTuple):
    """The encoded bytes of an image, and its captions."""

    data: bytes
    captions: tuple[str, ...]


class Place(NamedTuple):
    """The file (path or URL) that holds an image, and from which byte on."""

    file: str
    offset: int


class ImageTextSource(ABC):
    """Images with any number of captions each, in a fixed order, with random access.

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
        """Number of images."""

    @abstractmethod
    def key(self, index: int) -> str:
        """The unique name of an image: its path relative to the folder, or its key in the shards."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image, stripped, none of them blank; empty if it has none."""

    @abstractmethod
    def open_bytes(self, index: int) -> bytes:
        """The encoded bytes of an image. Raises OSError if they can't be read."""

    def read(self, index: int) -> Sample:
        """Image and captions at once. Raises as `open_bytes` does, and ValueError for captions that aren't text."""
        return Sample(self.open_bytes(index), self.captions(index))

    def read_captions(self, index: int) -> tuple[str, ...]:
        """The captions that `read` gives, without the image."""
        return self.captions(index)

    def place(self, index: int) -> Place:
        """Where an image lies, for messages."""
        return Place(self.key(index), 0)

    def draw_texts(self, index: int, captions: Sequence[str], wanted: int, bits: np.random.PCG64) -> list[str] | None:
        """Texts made up anew at each visit out of what `read` gives as captions, `wanted` of them or none.

        None where the captions themselves are shown.
        """
        return None
