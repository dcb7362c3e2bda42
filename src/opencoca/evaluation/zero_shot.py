"""Zero-shot classification of a whole source of labelled images.

A labelled source is an `ImageTextSource` whose one caption an image is its label: see `open_labelled`.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from opencoca.data import ImageFolder, ImageTextSource, list_images, open_source
from opencoca.evaluation.encoding import BrokenImage, encode_images, require_images
from opencoca.evaluation.prompts import ClassificationScores, classification_scores, zero_shot_weights
from opencoca.inference.labels import Rule
from opencoca.inference.pipeline import Pipeline


@dataclass(frozen=True)
class ZeroShotReport:
    """scores: accuracies; labels: all that were to choose from, which `scores.confusions` counts by position."""

    scores: ClassificationScores
    labels: tuple[str, ...]
    names: tuple[str, ...]
    broken_images: tuple[BrokenImage, ...]


def open_labelled(images: str | Path, labels: str | Path | None = None) -> ImageTextSource:
    """Images with their labels: from a table with the columns image and label, or one sub-folder a class without it.

    Raises:
        FileNotFoundError: a folder, the table, or an image that it names does not exist.
        ValueError: no images, an image outside of the sub-folders, or one that has no label or several.
    """
    if labels is None:
        keys = list_images(images)
        if loose := [key for key in keys if "/" not in key]:
            raise ValueError(
                f"the image {loose[0]!r} lies in {str(images)!r} itself, not in a sub-folder named after its class; "
                "move it there, or give a table of labels"
            )
        return ImageFolder(images, keys, {key: (key.split("/")[0],) for key in keys})
    source = open_source(images, labels, caption_column="label")
    for index in range(len(source)):
        own = source.captions(index)
        if len(own) != 1:
            found = f"{len(own)} labels ({', '.join(own)})" if own else "no label"
            raise ValueError(f"the image {source.key(index)!r} has {found} in {str(labels)!r}; give each image one")
    return source


def read_class_names(path: str | Path) -> dict[str, str]:
    """What labels are called in prompts, from a CSV file with the columns label and name.

    Raises FileNotFoundError without the file, ValueError if it is not such a table.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no table of class names {str(path)!r}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns, rows = reader.fieldnames or [], list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the table of class names {str(path)!r}: {error}") from error
    for column in ("label", "name"):
        if column not in columns:
            raise ValueError(f"the table of class names {str(path)!r} has no column {column!r}")
    if not rows or not all(row["label"] and row["name"] for row in rows):
        raise ValueError(f"the table of class names {str(path)!r} is empty, or a row of it lacks a label or a name")
    return {row["label"]: row["name"] for row in rows}


def evaluate_zero_shot(
    pipeline: Pipeline,
    source: ImageTextSource,
    templates: Sequence[str],
    class_names: Mapping[str, str] | None = None,
    *,
    by: Rule = "similarity",
    batch_size: int = 32,
    progress: bool = False,
) -> ZeroShotReport:
    """Gives every image the label whose prompts are most similar to it.

    Args:
        source: see `open_labelled`.
        templates: prompts with {} for the class's name.
        class_names: names by label; labels that no image has are to choose from too. None: the labels of the images,
            underscores read as spaces.
        by: ``similarity`` of the embeddings, ``likelihood`` of the prompts by the captioner, less their likelihood for
            a blank image, or ``both``: see `Pipeline.classify`.

    Raises:
        ValueError: no image can be read, a label has no name, unusable templates, or no such rule.
    """
    present = {source.captions(index)[0] for index in range(len(source))}
    names = dict(class_names) if class_names else {label: label.replace("_", " ") for label in sorted(present)}
    if unnamed := sorted(present - names.keys()):
        raise ValueError(f"{len(unnamed)} labels have no class name: {', '.join(unnamed[:5])}; add them to the table")
    labels = tuple(names)
    logits_of = _logits_of(pipeline, list(names.values()), templates, by, progress)
    position = {label: number for number, label in enumerate(labels)}
    logits: list[torch.Tensor] = []
    targets: list[int] = []
    broken: list[BrokenImage] = []
    for batch in encode_images(pipeline, source, batch_size, progress=progress, description="classifying images"):
        logits.append(logits_of(batch.tokens, batch.embed))
        targets += [position[source.captions(index)[0]] for index in batch.indices]
        broken += batch.broken
    require_images(len(targets), broken)
    scores = classification_scores(torch.cat(logits), torch.tensor(targets))
    return ZeroShotReport(scores, labels, tuple(names.values()), tuple(broken))


def _logits_of(
    pipeline: Pipeline, names: list[str], templates: Sequence[str], by: Rule, progress: bool
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What ranks the labels of an image, as a function of its tokens and its embedding."""
    if by != "similarity":
        return pipeline.label_logits(names, templates, by)
    weights = _weights(pipeline, names, templates, progress)
    return lambda image_tokens, image_embed: image_embed @ weights.T


def _weights(pipeline: Pipeline, names: list[str], templates: Sequence[str], progress: bool) -> torch.Tensor:
    with tqdm(total=len(names), desc="embedding labels", unit="label", disable=not progress) as bar:

        def advance(done: int, total: int) -> None:
            bar.update()

        return zero_shot_weights(pipeline.embed_texts, names, templates, advance)
