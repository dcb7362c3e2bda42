"""Labels for images: how they are compared, the sentences made of them, and the ranking that comes of it.

Letters: I images, L labels, N image features, C their width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opencoca.data.labels import check_templates, fill_templates
from opencoca.generation.scoring import TextScorer, label_scores, pointwise_mutual_information

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


@dataclass(frozen=True)
class LabelLogits:
    """Compares images with labels by a rule: `embeds` (L, E) serve similarity, `scorer` and `prior` likelihood.

    The logits of similarity are cosines times `scale`.
    """

    num_labels: int
    scale: Tensor
    embeds: Tensor | None
    scorer: TextScorer | None
    prior: Tensor | None

    def __call__(self, image_tokens: Tensor, image_embed: Tensor) -> Tensor:
        """Returns logits (I, L) float32 on the CPU, from image tokens (I, Q, D) and embeddings (I, E)."""
        total = torch.zeros(len(image_tokens), self.num_labels)
        if self.embeds is not None:
            total += self.scale * (image_embed.float().cpu() @ self.embeds.T)
        if self.scorer is not None and self.prior is not None:
            information = pointwise_mutual_information(self.scorer.score_all(image_tokens), self.prior)
            total += label_scores(information.float().cpu(), self.num_labels)
        return total


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
