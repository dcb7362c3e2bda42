"""Classes as text: prompts with one `{}` for the name of a class, and a source that shows its targets as captions.

CoCa, arXiv:2205.01917, section 3.2: labels are treated as text, so that annotated images and alt-text train one model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opencoca.data.languages import in_language
from opencoca.data.source import Sample, SampleSource, SourceView
from opencoca.data.targets import Target, target_names

DEFAULT_PROMPTS = ("a photo of {}.",)


def check_templates(templates: Sequence[str]) -> None:
    """Raises ValueError for no templates, one bare text, or a template in which `{}` doesn't stand once."""
    if isinstance(templates, str):
        raise ValueError(f"the prompt templates are the single text {templates!r}; give a list of them")
    if not templates:
        raise ValueError("there are no prompt templates; give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"the prompt template {template!r} must contain {{}} once, where the name of the class goes"
            )


def fill_templates(name: str, templates: Sequence[str]) -> list[str]:
    """Puts a name in place of `{}` in every template; other braces stay as they are.

    Raises ValueError for a blank name, and as `check_templates` does.
    """
    check_templates(templates)
    if not name.strip():
        raise ValueError(f"the label {name!r} is empty; give every label a name")
    return [template.replace("{}", name) for template in templates]


class LabelSource(SourceView):
    """A source whose targets are shown as texts; each visit makes a new text of the labels of an image.

    The labels are shuffled, joined and put into a prompt. `captions` gives them in their order, in the first prompt.

    Args:
        source: images with targets: one class each, or several labels. Underscores in labels become spaces.
        prompts: texts with one `{}` for the labels, one of which is drawn at each visit.
        separator: between several labels of one image.
        language: of the prompts; None: not known.
    """

    def __init__(
        self,
        source: SampleSource,
        prompts: Sequence[str] = DEFAULT_PROMPTS,
        separator: str = ", ",
        language: str | None = None,
    ):
        check_templates(prompts)
        self.source, self.prompts, self.separator, self.language = source, tuple(prompts), separator, language
        self.captions_in_memory, self.is_remote, self.lost = False, source.is_remote, source.lost
        self.block_starts = source.block_starts
        self.missing_images = source.missing_images

    def __len__(self) -> int:
        return len(self.source)

    def locate(self, index: int) -> tuple[SampleSource, int]:
        return self.source, index

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        sample = self.source.read(index, images=images, texts=False, target=target or texts)
        labels = _words(sample.target)
        return sample._replace(texts=(self._text(labels, self.prompts[0]),) if labels else ())

    def draw_texts(self, index: int, sample: Sample, wanted: int, bits: np.random.PCG64) -> list[str] | None:
        labels, texts = _words(sample.target), []
        for _ in range(wanted if labels else 0):
            shuffled = [labels[place] for place in np.argsort(bits.random_raw(len(labels)), kind="stable").tolist()]
            prompt = self.prompts[int(bits.random_raw() % np.uint64(len(self.prompts)))]
            texts.append(self._text(shuffled, prompt))
        return texts

    def _text(self, labels: Sequence[str], prompt: str) -> str:
        (text,) = in_language([prompt.replace("{}", self.separator.join(labels))], self.language)
        return text


def _words(target: Target | None) -> list[str]:
    return [name.replace("_", " ") for name in target_names(target)]
