"""Classification of a whole source: how often the right class has the largest logit, whatever the logits come from.

Letters: B images of a batch, L labels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opencoca.data import SampleSource
from opencoca.evaluation.encoding import EncodedImages
from opencoca.evaluation.prompts import classification_scores
from opencoca.evaluation.runner import Scores


class Answers(NamedTuple):
    """logits (B, L) float32 and targets (B,) int64, on the CPU; indices: of the images in the source."""

    indices: tuple[int, ...]
    logits: Tensor
    targets: Tensor


class CountMatrix(NamedTuple):
    """How often which label stood beside which.

    title; rows and columns: what their labels are; labels (L,); counts: L rows of L.
    """

    title: str
    rows: str
    columns: str
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """In JSON's types, as a run stores it."""
        return {"kind": "count_matrix", **self._asdict()}

    @staticmethod
    def from_json(content: Any) -> "CountMatrix | None":
        """The inverse of `to_json`; None for another kind of content."""
        if not isinstance(content, dict) or content.get("kind") != "count_matrix":
            return None
        counts = tuple(tuple(row) for row in content["counts"])
        return CountMatrix(content["title"], content["rows"], content["columns"], tuple(content["labels"]), counts)


def class_of(source: SampleSource, index: int) -> str:
    """The class of an image. Raises ValueError if it has none, or several."""
    target = source.target(index)
    if not isinstance(target, str):
        raise ValueError(f"the image {source.key(index)!r} has {'no' if target is None else 'more than one'} label")
    return target


class ClassificationEvaluator:
    """Compares the logits of every image with its class."""

    def __init__(self, logits_of: Callable[[EncodedImages], Tensor], targets: Sequence[int]):
        """logits_of: images -> (B, L); targets: the class of every image of the source, from 0."""
        self.logits_of, self.targets = logits_of, targets

    def rows(self, images: EncodedImages) -> Answers:
        targets = torch.tensor([self.targets[index] for index in images.indices])
        return Answers(images.indices, self.logits_of(images).float().cpu(), targets)

    def scores(self, rows: Sequence[Answers]) -> Scores:
        scores = classification_scores(torch.cat([part.logits for part in rows]), torch.cat([p.targets for p in rows]))
        return Scores({name: getattr(scores, name) for name in ("top1", "top5", "mean_per_class")}, scores)
