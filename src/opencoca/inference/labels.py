"""Labels for images: how they are compared, the sentences made of them, and the ranking that comes of it.

Letters: I images, L labels, N image features, C their width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from opencoca.data.labels import check_templates, fill_templates

DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "{}")

Rule = Literal["similarity", "likelihood", "both"]
"""What compares texts with an image: the embeddings' cosine, the captioner's likelihood, or the sum of both."""


class LabelScore(NamedTuple):
    """A label and its probability among all the labels that were compared."""

    label: str
    probability: float


@dataclass(frozen=True)
class Classifier:
    """Ranks labels for images whose features are there.

    logits: from features (I, N, C) of the image encoder to (I, L) float32 on the CPU.
    """

    labels: tuple[str, ...]
    logits: Callable[[Tensor], Tensor]

    def rank(self, features: Tensor) -> list[list[LabelScore]]:
        """All labels of each image with their probabilities (they sum to 1), the most probable first."""
        probabilities = self.logits(features).softmax(dim=-1)
        values, order = probabilities.sort(dim=-1, descending=True, stable=True)
        return [
            [LabelScore(self.labels[position], value) for position, value in zip(positions, row, strict=True)]
            for positions, row in zip(order.tolist(), values.tolist(), strict=True)
        ]


def label_texts(labels: Sequence[str], templates: str | Sequence[str]) -> list[str]:
    """Every label in every template, the texts of a label side by side.

    Raises ValueError for no labels, the same one twice, or a template that does not contain {} once.
    """
    templates = [templates] if isinstance(templates, str) else list(templates)
    check_templates(templates)
    _check_labels(labels)
    return [text for label in labels for text in fill_templates(label, templates)]


def _check_labels(labels: Sequence[str]) -> None:
    if isinstance(labels, str):
        raise ValueError(f"labels is the single text {labels[:40]!r}; give a list of labels")
    if not labels:
        raise ValueError("there are no labels to choose from; give at least one")
    for position, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(f"label number {position} is {label!r}, not a string")
    if twice := [label for position, label in enumerate(labels) if label in labels[:position]]:
        raise ValueError(f"the label {twice[0]!r} is given more than once; give each label once")
