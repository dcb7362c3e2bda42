"""Zero-shot classification without the model: templates of prompts, names of classes, and the scores.

Letters: N images, L labels.
"""

import importlib.resources
import json
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opencoca.data.labels import check_templates
from opencoca.system.messages import shown
from opencoca.system.reading import read_lines

SIMPLE_TEMPLATES = ("a photo of a {}.",)
NUM_CONFUSIONS = 10


def load_templates(name_or_path: str = "clip") -> tuple[str, ...]:
    """Prompt templates, each with ``{}`` where the label goes.

    Args:
        name_or_path: ``clip`` for the 80 templates that CLIP used on ImageNet, ``simple`` for "a photo of a {}." alone,
            or a UTF-8 text file with one template a line; empty lines are skipped.

    Raises:
        ValueError: no such file, a file without templates, or a template in which ``{}`` does not stand once.
    """
    if name_or_path == "clip":
        return tuple(_load_asset("clip_templates.json"))
    if name_or_path == "simple":
        return SIMPLE_TEMPLATES
    try:
        templates = tuple(read_lines(name_or_path, "templates"))
    except OSError as error:
        raise ValueError(
            f"cannot read the templates in {shown(name_or_path)} ({error.strerror}); give clip, simple or a text file"
        ) from error
    try:
        check_templates(templates)
    except ValueError as error:
        raise ValueError(f"{name_or_path}: {error}") from None
    return templates


def load_imagenet_class_names() -> tuple[str, ...]:
    """The 1,000 ImageNet class names in the order of its class ids, worded for prompts as CLIP uses them."""
    return tuple(_load_asset("imagenet_class_names.json"))


def _load_asset(name: str) -> list[str]:
    asset = importlib.resources.files("opencoca").joinpath("assets/prompts", name)
    return json.loads(asset.read_text(encoding="utf-8"))


class Confusion(NamedTuple):
    """``count`` images of the class ``target`` were taken for ``predicted`` (both are indices of labels)."""

    target: int
    predicted: int
    count: int


@dataclass(frozen=True)
class ClassificationScores:
    """Accuracies between 0 and 1 (tables print them times 100).

    ``mean_per_class`` averages the accuracy of each class that occurs in the targets, so that rare classes count as
    much as frequent ones. ``confusions`` holds the most frequent mistakes first.
    """

    top1: float
    top5: float
    mean_per_class: float
    confusions: tuple[Confusion, ...]
    num_images: int
    num_labels: int


@torch.no_grad()
def classification_scores(logits: Tensor, targets: Tensor) -> ClassificationScores:
    """Score similarities of N images to L labels.

    Args:
        logits: (N, L), the larger the more similar.
        targets: (N,) integers, the right label of each image.

    Among labels that are equally similar the first is taken, as argmax does: equal logits score like guessing. With
    five labels or fewer, ``top5`` is 1.

    Raises:
        ValueError: shapes that do not fit, no images, a target that is no label, or logits that are not finite.
    """
    if logits.ndim != 2 or 0 in logits.shape or targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)} of type {targets.dtype}: give "
            "(N, L) similarities and one integer label an image."
        )
    num_labels = logits.shape[1]
    targets = targets.to(logits.device, torch.int64)
    outside = (targets < 0) | (targets >= num_labels)
    if outside.any():
        image = int(outside.nonzero()[0])
        raise ValueError(f"Image {image} has the target {int(targets[image])}, but there are {num_labels} labels.")
    if not logits.isfinite().all():
        image = int((~logits.isfinite()).nonzero()[0, 0])
        raise ValueError(f"The logits of image {image} are not finite: the model gave NaN or infinity.")

    right = logits.gather(1, targets[:, None])
    before = torch.arange(num_labels, device=logits.device) < targets[:, None]
    rank = (logits > right).sum(dim=1) + ((logits == right) & before).sum(dim=1) + 1
    correct = (rank == 1).double()
    num_of_class = torch.bincount(targets, minlength=num_labels)
    correct_of_class = torch.zeros(num_labels, dtype=torch.float64, device=logits.device).index_add(0, targets, correct)
    present = num_of_class > 0
    return ClassificationScores(
        top1=correct.mean().item(),
        top5=(rank <= 5).double().mean().item(),
        mean_per_class=(correct_of_class[present] / num_of_class[present]).mean().item(),
        confusions=_confusions(targets, logits, rank),
        num_images=len(logits),
        num_labels=num_labels,
    )


def _confusions(targets: Tensor, logits: Tensor, rank: Tensor) -> tuple[Confusion, ...]:
    wrong = rank > 1
    others = logits[wrong].scatter(1, targets[wrong][:, None], -torch.inf)  # a tied right label is no prediction
    pairs = zip(targets[wrong].tolist(), others.argmax(dim=1).tolist(), strict=True)
    most = sorted(Counter(pairs).items(), key=lambda item: (-item[1], item[0]))[:NUM_CONFUSIONS]
    return tuple(Confusion(target, predicted, count) for (target, predicted), count in most)
