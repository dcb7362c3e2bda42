"""`opencoca evaluate`: scores a model on labelled or captioned images; prints a table and writes JSON."""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from opencoca.cli.common import (
    CommandError,
    add_command,
    add_group,
    add_model_options,
    check_writable,
    complain,
    format_table,
    load_pipeline,
    positive_int,
    write_json,
)
from opencoca.cli.generation_options import add_generation_options, chosen_generation_options

if TYPE_CHECKING:
    from opencoca.data import SampleSource
    from opencoca.evaluation.encoding import BrokenImage
    from opencoca.evaluation.prompts import ClassificationScores

_CAPTIONS = "--model runs/coca --images DIR --captions val.csv --out scores.json"
_LEFT_OUT = "Images that cannot be read are left out, counted, and named on stderr and in the JSON file."


def add_commands(commands: Any) -> None:
    group = add_group(commands, "evaluate", "Score a model: retrieval, captioning, or zero-shot classification.")
    _add_retrieval(group)
    _add_captioning(group)
    _add_zero_shot(group)
    _add_classification(group)


def _add_retrieval(group: Any) -> None:
    parser = add_command(
        group,
        "retrieval",
        run_retrieval,
        "Measure how well images find their captions and captions their images: recall at 1, 5 and 10, in percent.",
        example=f"opencoca evaluate retrieval {_CAPTIONS}",
        more=_LEFT_OUT,
    )
    _add_captioned_images(parser)
    parser.add_argument(
        "--rerank-top",
        type=positive_int,
        default=16,
        metavar="K",
        help="with --by likelihood or both: the number of best matches of each image and text that the captioner "
        "ranks again (default: 16)",
    )
    _add_by(parser)
    _add_common(parser)


def _add_captioning(group: Any) -> None:
    parser = add_command(
        group,
        "captioning",
        run_captioning,
        "Compare generated captions with human ones: BLEU-1 to 4, ROUGE-L and CIDEr-D, times 100.",
        example=f"opencoca evaluate captioning {_CAPTIONS} --save-captions captions.jsonl",
        more=_LEFT_OUT,
    )
    _add_captioned_images(parser)
    parser.add_argument("--save-captions", metavar="FILE", help="write JSON lines: image, caption, references")
    parser.add_argument(
        "--coco",
        action="store_true",
        help="also METEOR and SPICE (need the extra coco-metrics and Java; SPICE also a network)",
    )
    add_generation_options(parser.add_argument_group("generation, as in `opencoca caption`"))
    _add_common(parser)


def _add_zero_shot(group: Any) -> None:
    parser = add_command(
        group,
        "zero-shot",
        run_zero_shot,
        "Measure how often the right label's sentences fit an image best: accuracy, in percent.",
        example="opencoca evaluate zero-shot --images DIR --labels labels.csv --out scores.json",
        more=_LEFT_OUT,
    )
    _add_labelled_images(parser)
    parser.add_argument(
        "--class-names",
        metavar="CSV",
        help="table with the columns label and name: what a label is called in prompts (default: the label itself)",
    )
    parser.add_argument(
        "--templates",
        default="clip",
        metavar="T",
        help="sentences around a label: clip (80 of them), simple (one), or a text file with one on each line and {} "
        "for the label (default: clip)",
    )
    _add_by(parser)
    _add_common(parser)


def _add_classification(group: Any) -> None:
    parser = add_command(
        group,
        "classification",
        run_classification,
        "How often a finetuned classifier names the right class: accuracy, in percent, over all and for each class.",
        example="opencoca evaluate classification --model runs/classes --images DIR --labels test.csv",
        more=_LEFT_OUT,
    )
    _add_labelled_images(parser)
    _add_common(parser)


def _add_labelled_images(parser: Any) -> None:
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of images")
    parser.add_argument(
        "--labels",
        metavar="CSV",
        help="table with the columns image and label (default: the sub-folder that an image lies in is its label)",
    )


def _add_captioned_images(parser: Any) -> None:
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of images, or tar shards")
    parser.add_argument(
        "--captions",
        metavar="CSV",
        help="table (CSV, TSV, JSONL or Parquet) with the columns image and caption; several captions of an image "
        "are several rows or a list; tar shards contain their own captions",
    )


def _add_by(parser: Any) -> None:
    parser.add_argument(
        "--by",
        choices=("similarity", "likelihood", "both"),
        default="similarity",
        help="compare embeddings (similarity), or how much more probable the image makes a text for the captioner "
        "(likelihood), or add both (default: similarity)",
    )


def _add_common(parser: Any) -> None:
    parser.add_argument("--out", metavar="FILE", help="write scores, counts and settings as JSON")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images")
    add_model_options(parser)


def run_retrieval(arguments: argparse.Namespace) -> int:
    from opencoca.evaluation.retrieval import evaluate_retrieval

    check_writable(arguments.out)
    source = _open_captioned(arguments)
    pipeline = load_pipeline(arguments)
    started = time.perf_counter()
    report = evaluate_retrieval(
        pipeline,
        source,
        by=arguments.by,
        rerank_top=arguments.rerank_top,
        batch_size=arguments.batch_size,
        progress=True,
    )
    scores = asdict(report.scores)
    counts = {
        "images": scores.pop("num_images"),
        "captions": scores.pop("num_texts"),
        "images_without_captions": report.num_images_without_captions,
    }
    rows = [(f"{direction} R@{k}", scores[f"{key}_r{k}"]) for key, direction in _DIRECTIONS for k in (1, 5, 10)]
    table = [(name, f"{100 * value:.2f}") for name, value in rows]
    table += [(f"{direction} median rank", f"{scores[f'{key}_median_rank']:g}") for key, direction in _DIRECTIONS]
    _finish(arguments, "retrieval", scores, table, counts, report.broken_images, started)
    return 0


_DIRECTIONS = (("image_to_text", "image to text"), ("text_to_image", "text to image"))


def run_captioning(arguments: argparse.Namespace) -> int:
    from opencoca.evaluation.captioning import evaluate_captioning
    from opencoca.generation.rerank import check_rerank, rerank_weight

    check_writable(arguments.out, arguments.save_captions)
    source = _open_captioned(arguments)
    options = chosen_generation_options(arguments)
    check_rerank(options, arguments.rerank)
    pipeline = load_pipeline(arguments)
    started = time.perf_counter()
    report = evaluate_captioning(
        pipeline, source, options, rerank=arguments.rerank, batch_size=arguments.batch_size, progress=True
    )
    if arguments.save_captions:
        _write_captions(arguments.save_captions, report.captions, report.references)
    scores = asdict(report.scores)
    del scores["cider_d_of_image"]
    counts = {
        "images": scores.pop("num_images"),
        "captions": sum(map(len, report.references.values())),
        "images_without_captions": report.num_images_without_captions,
    }
    problem = None
    if arguments.coco:
        more, problem = _coco_scores(report.captions, report.references)
        scores |= more
    table = [(_METRICS[name], f"{100 * value:.2f}") for name, value in scores.items()]
    decoding = {**asdict(options), "rerank": rerank_weight(arguments.rerank)}
    _finish(arguments, "captioning", scores, table, counts, report.broken_images, started, decoding=decoding)
    if problem:
        raise CommandError(problem)
    return 0


_METRICS = {f"bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)}
_METRICS |= {"rouge_l": "ROUGE-L", "cider_d": "CIDEr-D", "meteor": "METEOR", "spice": "SPICE"}


def _coco_scores(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], str | None]:
    """Computes METEOR and SPICE as far as possible; also returns a sentence about those that failed."""
    from opencoca.evaluation.coco_extra import CocoMetricsError, coco_scores

    try:
        return coco_scores(captions, references), None
    except CocoMetricsError as error:
        return error.scores, str(error)
    except ImportError as error:
        return {}, str(error)


def run_zero_shot(arguments: argparse.Namespace) -> int:
    from opencoca.data import open_labelled
    from opencoca.evaluation.prompts import load_templates
    from opencoca.evaluation.zero_shot import evaluate_zero_shot, read_class_names

    check_writable(arguments.out)
    source = _limited(open_labelled(arguments.images, arguments.labels), arguments.limit)
    names = read_class_names(arguments.class_names) if arguments.class_names else None
    templates = load_templates(arguments.templates)
    pipeline = load_pipeline(arguments)
    started = time.perf_counter()
    report = evaluate_zero_shot(
        pipeline, source, templates, names, by=arguments.by, batch_size=arguments.batch_size, progress=True
    )
    scores, table = _accuracies(report.scores)
    counts = {"images": report.scores.num_images, "labels": len(report.labels), "templates": len(templates)}
    confusions = _confusions(report.labels, report.scores)
    _finish(arguments, "zero-shot", scores, table, counts, report.broken_images, started, confusions=confusions)
    return 0


def run_classification(arguments: argparse.Namespace) -> int:
    from opencoca.data import open_labelled
    from opencoca.evaluation.classification import evaluate_classification

    check_writable(arguments.out)
    source = _limited(open_labelled(arguments.images, arguments.labels), arguments.limit)
    pipeline = load_pipeline(arguments)
    started = time.perf_counter()
    report = evaluate_classification(pipeline, source, batch_size=arguments.batch_size, progress=True)
    scores, table = _accuracies(report.scores)
    counts = {"images": report.scores.num_images, "labels": len(report.classes)}
    more = {"per_class": report.per_class, "confusions": _confusions(report.classes, report.scores)}
    _finish(arguments, "classification", scores, table, counts, report.broken_images, started, **more)
    return 0


def _accuracies(found: "ClassificationScores") -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Accuracies by name, and the rows of the table that shows them."""
    titles = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
    scores = {name: getattr(found, name) for name in titles}
    return scores, [(title, f"{100 * scores[name]:.2f}") for name, title in titles.items()]


def _confusions(labels: Sequence[str], scores: "ClassificationScores") -> list[dict[str, Any]]:
    return [
        {"label": labels[found.target], "taken_for": labels[found.predicted], "images": found.count}
        for found in scores.confusions
    ]


def _open_captioned(arguments: argparse.Namespace) -> "SampleSource":
    from opencoca.data import ImageFolder, open_source

    source = open_source(arguments.images, arguments.captions)
    if arguments.captions is None and isinstance(source, ImageFolder):
        raise CommandError(f"{arguments.images!r} is a folder of images without captions; add --captions CSV")
    return _limited(source, arguments.limit)


def _limited(source: "SampleSource", limit: int | None) -> "SampleSource":
    from opencoca.data import Subset

    return source if limit is None else Subset(source, range(min(limit, len(source))))


def _finish(
    arguments: argparse.Namespace,
    task: str,
    scores: Mapping[str, float],
    table: list[tuple[str, str]],
    counts: Mapping[str, int],
    broken: "Sequence[BrokenImage]",
    started: float,
    *,
    confusions: Sequence[Mapping[str, Any]] | None = None,
    per_class: Mapping[str, float] | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> None:
    """Prints the table and, with --out, writes the scores with everything that tells how they were measured."""
    import opencoca
    from opencoca.inference.loading import DEFAULT_MODEL

    seconds = time.perf_counter() - started
    for image in broken:
        complain(image.reason)
    counts = {**counts, "broken_images": len(broken)}
    print(format_table([*table, *((name.replace("_", " "), f"{count:,}") for name, count in counts.items())]))
    if not arguments.out:
        return
    places = ("images", "captions", "labels", "class_names")
    settings = ("batch_size", "limit", "device", "dtype", "templates", "by", "rerank_top")
    given = vars(arguments)
    content = {
        "task": task,
        "metrics": dict(scores),
        "model": arguments.model or DEFAULT_MODEL,
        "data": {name: given[name] for name in places if name in given},
        "counts": counts,
        "broken_images": [asdict(image) for image in broken],
        **({} if confusions is None else {"confusions": confusions}),
        **({} if per_class is None else {"per_class": dict(per_class)}),
        "seconds": round(seconds, 3),
        "opencoca_version": opencoca.__version__,
        "settings": {**{name: given[name] for name in settings if name in given}, **(decoding or {})},
    }
    write_json(arguments.out, content)


def _write_captions(path: str, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    import json

    from opencoca.system.files import atomic_write

    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for image, caption in captions.items():
            row = {"image": image, "caption": caption, "references": references[image]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
