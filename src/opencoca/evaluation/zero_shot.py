"""Zero-shot classification of a whole source of labelled images.

Every image of the source has a class as its target: see `opencoca.data.open_labelled`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opencoca.data import SampleSource
from opencoca.data.tables import Table, TableColumns
from opencoca.evaluation.classification import ClassificationEvaluator, class_of
from opencoca.evaluation.encoding import BrokenImage, encode_images
from opencoca.evaluation.prompts import ClassificationScores
from opencoca.evaluation.runner import evaluate
from opencoca.inference.labels import Rule
from opencoca.inference.pipeline import Pipeline


@dataclass(frozen=True)
class ZeroShotReport:
    """scores: accuracies; labels: all that were to choose from, which `scores.confusions` counts by position."""

    scores: ClassificationScores
    labels: tuple[str, ...]
    names: tuple[str, ...]
    broken_images: tuple[BrokenImage, ...]


def read_class_names(path: str | Path) -> dict[str, str]:
    """What labels are called in prompts, from a table (CSV, TSV, JSON lines, Parquet) with the columns label and name.

    Raises FileNotFoundError without the file, ValueError if it is not such a table.
    """
    names: dict[str, str] = {}
    for row in Table(path).rows(TableColumns(None, "name", "label")):
        name = " ".join(row.captions)
        if not name or not isinstance(row.target, str):
            raise ValueError(f"{row.where} lacks a label or a name")
        names[row.target] = name
    if not names:
        raise ValueError(f"the table of class names {str(path)!r} is empty")
    return names


def evaluate_zero_shot(
    pipeline: Pipeline,
    source: SampleSource,
    templates: Sequence[str],
    class_names: Mapping[str, str] | None = None,
    *,
    by: Rule = "similarity",
    batch_size: int = 32,
    progress: bool = False,
) -> ZeroShotReport:
    """Gives every image the label whose prompts are most similar to it.

    Args:
        source: images with classes; see `opencoca.data.open_labelled`.
        templates: prompts with {} for the class's name.
        class_names: names by label; labels that no image has are to choose from too. None: the labels of the images,
            underscores read as spaces.
        by: ``similarity`` of the embeddings, ``likelihood`` of the prompts by the captioner, less their likelihood for
            a blank image, or ``both``: see `Pipeline.classify`.

    Raises:
        ValueError: no image can be read, a label has no name, unusable templates, or no such rule.
    """
    classes = [class_of(source, index) for index in range(len(source))]
    present = set(classes)
    names = dict(class_names) if class_names else {label: label.replace("_", " ") for label in sorted(present)}
    if unnamed := sorted(present - names.keys()):
        raise ValueError(f"{len(unnamed)} labels have no class name: {', '.join(unnamed[:5])}; add them to the table")
    labels = tuple(names)
    texts = list(dict.fromkeys(names.values()))  # two labels may have one name
    logits_of = pipeline.label_logits(texts, templates, by, progress=progress)
    columns = [texts.index(name) for name in names.values()]
    position = {label: number for number, label in enumerate(labels)}
    targets = [position[name] for name in classes]
    evaluator = ClassificationEvaluator(
        lambda images: logits_of(images.tokens, images.embed)[:, columns], targets, labels
    )
    batches = encode_images(pipeline, source, batch_size, progress=progress, description="classifying images")
    (report,), broken = evaluate(batches, evaluator)
    return ZeroShotReport(report.detail, labels, tuple(names.values()), broken)
