"""Classification of a whole source: how often the right class has the largest logit, whatever the logits come from.

Letters: B images of a batch, L labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opencoca.data import SampleSource
from opencoca.evaluation.encoding import BrokenImage, EncodedImages, encode_images
from opencoca.evaluation.prompts import ClassificationScores, classification_scores
from opencoca.evaluation.runner import Scores, evaluate
from opencoca.inference.pipeline import Pipeline


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


class HeadEvaluator:
    """Classifies images by a model's own head, and keeps what each was taken for.

    Images whose class the model does not know are refused. Raises ValueError, naming one, if there are any.
    """

    def __init__(self, source: SampleSource, classes: Sequence[str]):
        self.source, self.classes = source, tuple(classes)
        number = {name: position for position, name in enumerate(self.classes)}
        names = [class_of(source, index) for index in range(len(source))]
        unknown = [index for index, name in enumerate(names) if name not in number]
        if unknown:
            raise ValueError(
                f"the image {source.key(unknown[0])!r} has the label {names[unknown[0]]!r}, which is none of the "
                f"{len(self.classes)} classes that the model was trained on"
            )
        logits_of = lambda images: images.network.head_logits(images.features)  # noqa: E731
        self._inner = ClassificationEvaluator(logits_of, [number[name] for name in names])

    def rows(self, images: EncodedImages) -> Answers:
        return self._inner.rows(images)

    def scores(self, rows: Sequence[Answers]) -> Scores:
        found = self._inner.scores(rows)
        texts, counts = {}, torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        for part in rows:
            probabilities, predicted = part.logits.softmax(dim=1).max(dim=1)
            answers = zip(part.indices, predicted.tolist(), probabilities.tolist(), part.targets.tolist(), strict=True)
            for index, answer, probability, target in answers:
                counts[target, answer] += 1
                right = "" if answer == target else f", not {self.classes[target]}"
                texts[self.source.key(index)] = f"{self.classes[answer]} {100 * probability:.0f}%{right}"
        matrix = CountMatrix("classes of validation images", "class", "taken for", self.classes, _rows_of(counts))
        return Scores(found.values, found.detail, texts, {"confusion": matrix.to_json()})


def _rows_of(counts: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in counts.tolist())


@dataclass(frozen=True)
class ClassificationReport:
    """scores: accuracies; per_class: the accuracy of each class that occurs; texts: what each image was taken for."""

    scores: ClassificationScores
    classes: tuple[str, ...]
    per_class: dict[str, float]
    texts: dict[str, str]
    broken_images: tuple[BrokenImage, ...]


def evaluate_classification(
    pipeline: Pipeline, source: SampleSource, *, batch_size: int = 32, progress: bool = False
) -> ClassificationReport:
    """Classifies all images of a source, which have classes as targets, by the model's own head.

    Raises ValueError if the model has none, no image can be read, or an image's class is unknown to the model.
    """
    classes = pipeline.classes
    if classes is None:
        raise ValueError("this model was not trained on classes; evaluate it with zero-shot, or train a classifier")
    batches = encode_images(pipeline, source, batch_size, progress=progress, description="classifying images")
    found, broken = evaluate(batches, HeadEvaluator(source, classes))
    matrix = CountMatrix.from_json(found.kept["confusion"])
    assert matrix is not None
    per_class = {
        name: row[number] / sum(row)
        for number, (name, row) in enumerate(zip(matrix.labels, matrix.counts, strict=True))
        if sum(row)
    }
    return ClassificationReport(found.detail, tuple(classes), per_class, found.texts, broken)
