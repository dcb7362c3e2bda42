"""Data sets of class labels, as text: the labels of an image are shuffled, joined and put into a prompt.

CoCa, arXiv:2205.01917, section 3.2: labels are treated as text, so that annotated images and alt-text train one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from opencoca.data.source import ImageTextSource, Place, Sample

LabelsFrom = Literal["captions", "folders"]
DEFAULT_PROMPTS = ("a photo of {}.",)


def _shuffled(length: int, bits: np.random.PCG64) -> list[int]:
    return np.argsort(bits.random_raw(length), kind="stable").tolist()


class LabelSource(ImageTextSource):
    """A source whose images carry labels instead of sentences; each visit makes a new text of them.

    Args:
        source: the images.
        labels_from: `captions` takes what the table's or shards' caption column holds, one label or a list;
            `folders` the name of the folder that an image lies in. Underscores in labels become spaces.
        prompts: texts with one `{}` for the labels, one of which is drawn at each visit.
        separator: between several labels of one image.
    """

    def __init__(
        self,
        source: ImageTextSource,
        labels_from: LabelsFrom = "captions",
        prompts: Sequence[str] = DEFAULT_PROMPTS,
        separator: str = ", ",
    ):
        for prompt in prompts:
            if prompt.count("{}") != 1:
                raise ValueError(f"a prompt must hold {{}} once, where the labels go; got {prompt!r}")
        if not prompts:
            raise ValueError("labels need at least one prompt, such as 'a photo of {}.'")
        self.source, self.labels_from, self.prompts, self.separator = source, labels_from, tuple(prompts), separator
        self.captions_in_memory, self.is_remote, self.lost = False, source.is_remote, source.lost
        self.block_starts = source.block_starts
        self.missing_images, self.blank_captions = source.missing_images, ()

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def place(self, index: int) -> Place:
        return self.source.place(index)

    def labels(self, index: int) -> tuple[str, ...]:
        """The labels of an image, in the order in which they are stored."""
        return self._labels(index, self.source.captions(index) if self.labels_from == "captions" else ())

    def captions(self, index: int) -> tuple[str, ...]:
        """One text: the labels in their order, in the first prompt."""
        return self._plain(self.labels(index))

    def open_bytes(self, index: int) -> bytes:
        return self.source.open_bytes(index)

    def read(self, index: int) -> Sample:
        data, captions = self.source.read(index)
        return Sample(data, self._labels(index, captions))

    def read_captions(self, index: int) -> tuple[str, ...]:
        return self.labels(index)

    def draw_texts(self, index: int, captions: Sequence[str], wanted: int, bits: np.random.PCG64) -> list[str] | None:
        """`wanted` texts of the labels that `read` gave as captions."""
        texts = []
        for _ in range(wanted if captions else 0):
            shuffled = [captions[place] for place in _shuffled(len(captions), bits)]
            prompt = self.prompts[int(bits.random_raw() % np.uint64(len(self.prompts)))]
            texts.append(prompt.replace("{}", self.separator.join(shuffled)))
        return texts

    def _labels(self, index: int, captions: Sequence[str]) -> tuple[str, ...]:
        folder = PurePosixPath(self.source.key(index)).parent.name
        found = captions if self.labels_from == "captions" else filter(None, [folder])
        return tuple(label.replace("_", " ") for label in found)

    def _plain(self, labels: Sequence[str]) -> tuple[str, ...]:
        return (self.prompts[0].replace("{}", self.separator.join(labels)),) if labels else ()
