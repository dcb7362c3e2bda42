"""Classification of a whole source: how often the right class has the largest logit, whatever the logits come from.

Letters: B images of a batch, L labels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opencoca.data import SampleSource
from opencoca.evaluation.encoding import EncodedImages
from opencoca.evaluation.prompts import ClassificationScores, classification_scores
from opencoca.evaluation.runner import CountMatrix, Scores


class Answers(NamedTuple):
    """logits (B, L) float32 and targets (B,) int64, on the CPU; indices: of the images in the source."""

    indices: tuple[int, ...]
    logits: Tensor
    targets: Tensor


def class_of(source: SampleSource, index: int) -> str:
    """The class of an image. Raises ValueError if it has none, or several."""
    target = source.target(index)
    if not isinstance(target, str):
        raise ValueError(f"the image {source.key(index)!r} has {'no' if target is None else 'more than one'} label")
    return target


def named_confusions(scores: ClassificationScores, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent mistakes, the most frequent first, in JSON's types."""
    return [
        {"label": labels[found.target], "taken_for": labels[found.predicted], "images": found.count}
        for found in scores.confusions
    ]


class ClassificationEvaluator:
    """Compares the logits of every image with its class."""

    def __init__(self, logits_of: Callable[[EncodedImages], Tensor], targets: Sequence[int], labels: Sequence[str]):
        """logits_of: images -> (B, L); targets: the class of every image of the source, from 0; labels: the L names."""
        self.logits_of, self.targets, self.labels = logits_of, targets, tuple(labels)

    def rows(self, images: EncodedImages) -> Answers:
        targets = torch.tensor([self.targets[index] for index in images.indices])
        return Answers(images.indices, self.logits_of(images).float().cpu(), targets)

    def scores(self, rows: Sequence[Answers]) -> Scores:
        scores = classification_scores(torch.cat([part.logits for part in rows]), torch.cat([p.targets for p in rows]))
        return Scores(
            values={name: getattr(scores, name) for name in ("top1", "top5", "mean_per_class")},
            detail=scores,
            counts={"images": scores.num_images, "labels": scores.num_labels},
            written={"confusions": named_confusions(scores, self.labels)},
        )


class HeadEvaluator(ClassificationEvaluator):
    """Classifies images by a model's own head, and keeps what each was taken for."""

    def __init__(self, source: SampleSource, classes: Sequence[str]):
        """Raises ValueError, naming an image, if the model does not know the image's class."""
        number = {name: position for position, name in enumerate(classes)}
        names = [class_of(source, index) for index in range(len(source))]
        unknown = [index for index, name in enumerate(names) if name not in number]
        if unknown:
            raise ValueError(
                f"the image {source.key(unknown[0])!r} has the label {names[unknown[0]]!r}, which is none of the "
                f"{len(classes)} classes that the model was trained on"
            )
        targets = [number[name] for name in names]
        super().__init__(lambda images: images.network.head_logits(images.features), targets, classes)
        self.source = source

    def scores(self, rows: Sequence[Answers]) -> Scores:
        found = super().scores(rows)
        counts = torch.zeros(len(self.labels), len(self.labels), dtype=torch.int64)
        for part in rows:
            probabilities, predicted = part.logits.softmax(dim=1).max(dim=1)
            answers = zip(part.indices, predicted.tolist(), probabilities.tolist(), part.targets.tolist(), strict=True)
            for index, answer, probability, target in answers:
                counts[target, answer] += 1
                right = "" if answer == target else f", not {self.labels[target]}"
                found.texts[self.source.key(index)] = f"{self.labels[answer]} {100 * probability:.0f}%{right}"
        of_each = tuple(tuple(row) for row in counts.tolist())
        matrix = CountMatrix("classes of validation images", "class", "taken for", self.labels, of_each)
        found.kept["confusion"] = matrix.to_json()
        found.written["per_class"] = {
            name: row[number] / sum(row)
            for number, (name, row) in enumerate(zip(self.labels, of_each, strict=True))
            if sum(row)
        }
        return found
