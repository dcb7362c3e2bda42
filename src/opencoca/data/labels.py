"""Data sets of class labels, as text: the labels of an image are shuffled, joined and put into a prompt.

CoCa, arXiv:2205.01917, section 3.2: labels are treated as text, so that annotated images and alt-text train one model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opencoca.data.prompts import check_templates, fill_template
from opencoca.data.source import Place, Sample, SampleSource
from opencoca.data.targets import Target, target_names

DEFAULT_PROMPTS = ("a photo of {}.",)


class LabelSource(SampleSource):
    """A source whose targets are shown as texts; each visit makes a new text of the labels of an image.

    Args:
        source: images with targets: one class each, or several labels. Underscores in labels become spaces.
        prompts: texts with one `{}` for the labels, one of which is drawn at each visit.
        separator: between several labels of one image.
    """

    def __init__(self, source: SampleSource, prompts: Sequence[str] = DEFAULT_PROMPTS, separator: str = ", "):
        check_templates(prompts)
        self.source, self.prompts, self.separator = source, tuple(prompts), separator
        self.captions_in_memory, self.is_remote, self.lost = False, source.is_remote, source.lost
        self.block_starts = source.block_starts
        self.missing_images, self.blank_captions = source.missing_images, ()

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def place(self, index: int) -> Place:
        return self.source.place(index)

    def target(self, index: int) -> Target | None:
        return self.source.target(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """One text: the labels in their order, in the first prompt."""
        labels = _words(self.target(index))
        return (fill_template(self.prompts[0], self.separator.join(labels)),) if labels else ()

    def open_bytes(self, index: int) -> bytes:
        return self.source.open_bytes(index)

    def open_images(self, index: int) -> tuple[bytes, ...]:
        return self.source.open_images(index)

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        """The images and the target, of which `draw_texts` makes the texts."""
        return self.source.read(index, images=images, texts=False, target=target or texts)

    def draw_texts(self, index: int, sample: Sample, wanted: int, bits: np.random.PCG64) -> list[str] | None:
        labels, texts = _words(sample.target), []
        for _ in range(wanted if labels else 0):
            shuffled = [labels[place] for place in np.argsort(bits.random_raw(len(labels)), kind="stable").tolist()]
            prompt = self.prompts[int(bits.random_raw() % np.uint64(len(self.prompts)))]
            texts.append(fill_template(prompt, self.separator.join(shuffled)))
        return texts


def _words(target: Target | None) -> list[str]:
    return [name.replace("_", " ") for name in target_names(target)]
