"""`opencoca evaluate`: scores a model on labelled or captioned images; prints a table and writes JSON."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from opencoca.cli.common import (
    CommandError,
    add_by,
    add_captioned_images,
    add_columns,
    add_command,
    add_group,
    add_limit,
    add_model_options,
    add_overwrite,
    add_reading,
    add_source,
    add_templates,
    check_new,
    format_table,
    load_pipeline,
    open_captioned,
    positive_int,
    shard_storage,
    some_images,
)
from opencoca.cli.generation_options import add_generation_options, chosen_generation_options
from opencoca.cli.streams import complain_of_left_out

if TYPE_CHECKING:
    from opencoca.data import SampleSource
    from opencoca.evaluation.encoding import BrokenImage
    from opencoca.inference.pipeline import Pipeline

_CAPTIONS = "--model runs/coca --images DIR --captions val.csv --out scores.json"
# The tasks that models are finetuned on, by their names in recipes: what is measured, and the data of an example.
_FINETUNED = {
    "classification": (
        "Measure how often a finetuned classifier names the right class: accuracy, in percent, over all and per class.",
        "--images DIR --labels test.csv",
    ),
}
_TITLES = {f"bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)}
_TITLES |= {
    f"{way}_r{k}": f"{way.replace('_', ' ')} R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
}
_TITLES |= {"rouge_l": "ROUGE-L", "cider_d": "CIDEr-D", "meteor": "METEOR", "spice": "SPICE"}
_TITLES |= {"top1": "top-1", "top5": "top-5"}


class _Found(NamedTuple):
    """What an evaluation found; its fields go into the JSON file by these names, but for the last three.

    written: more entries of the file; settings: more settings than the command line shows; titles: what scores are
    called in the table; problem: why some scores are missing; notes: what the table says below the counts, and the file
    beside `written`.
    """

    scores: Mapping[str, float]
    counts: Mapping[str, int]
    broken: "Sequence[BrokenImage]"
    written: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}
    titles: Mapping[str, str] = _TITLES
    problem: str | None = None
    notes: Mapping[str, str] = {}


_Measure = Callable[[argparse.Namespace, "Pipeline", "SampleSource"], _Found]


def add_commands(commands: Any) -> None:
    group = add_group(
        commands, "evaluate", "Score a model: retrieval, captioning, zero-shot or trained classification."
    )
    parser = _add(
        group,
        "retrieval",
        _retrieval,
        "Measure how well images find their captions and captions their images: recall at 1, 5 and 10, in percent.",
        _CAPTIONS,
    )
    parser.add_argument(
        "--rerank-top",
        type=positive_int,
        default=16,
        metavar="K",
        help="with --by likelihood or both: the number of best matches of each image and text that the captioner "
        "ranks again",
    )
    add_by(parser)
    parser = _add(
        group,
        "captioning",
        _captioning,
        "Compare generated captions with human ones: BLEU-1 to 4, ROUGE-L and CIDEr-D, times 100.",
        f"{_CAPTIONS} --save-captions captions.jsonl",
    )
    parser.add_argument("--save-captions", metavar="FILE", help="write JSON lines: image, caption, references")
    parser.add_argument(
        "--coco",
        action="store_true",
        help="also METEOR and SPICE (need the extra coco-metrics and Java; SPICE also a network)",
    )
    add_generation_options(parser, "generation, as in `opencoca caption`")
    parser = _add(
        group,
        "zero-shot",
        _zero_shot,
        "Measure how often the right label's sentences fit an image best: accuracy, in percent.",
        "--images DIR --labels labels.csv --out scores.json",
        labelled=True,
    )
    parser.add_argument(
        "--class-names",
        metavar="CSV",
        help="table with the columns label and name: what a label is called in prompts (default: the label itself)",
    )
    add_templates(parser, "clip", "clip")
    add_by(parser)
    for task, (purpose, data) in _FINETUNED.items():
        _add(group, task, _finetuned, purpose, f"--model runs/{task} {data}", labelled=True)


def _add(group: Any, name: str, measure: _Measure, purpose: str, example: str, labelled: bool = False) -> Any:
    """Adds a command that scores a model on captioned, or on labelled, images."""

    def run(arguments: argparse.Namespace) -> int:
        return _run(arguments, _open_labelled if labelled else open_captioned, measure)

    more = (
        "Images that cannot be read are left out, counted, and named on stderr and in the JSON file; the exit code is\n"
        "then 2."
    )
    parser = add_command(group, name, run, purpose, example=f"opencoca evaluate {name} {example}", more=more)
    if labelled:
        add_source(parser, required=True)
        parser.add_argument(
            "--labels",
            metavar="CSV",
            help="table with the columns image and label (default: the sub-folder that an image lies in is its label)",
        )
        add_columns(parser, "image", "label")
        add_limit(parser)
        add_reading(parser)
    else:
        add_captioned_images(parser, required=True)
    parser.add_argument("--out", metavar="FILE", help="write scores, counts and settings as JSON")
    add_overwrite(parser)
    add_model_options(parser)
    return parser


def _open_labelled(arguments: argparse.Namespace) -> "SampleSource":
    from opencoca.data import open_labelled

    columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    source = open_labelled(arguments.images, arguments.labels, **columns, storage=shard_storage(arguments))
    return some_images(source, arguments.limit)


def _run(
    arguments: argparse.Namespace, open_source: Callable[[argparse.Namespace], "SampleSource"], measure: _Measure
) -> int:
    """Prints the table of scores and, with --out, writes them with everything that tells how they were measured."""
    check_new(arguments, arguments.out, getattr(arguments, "save_captions", None))
    source = open_source(arguments)
    pipeline = load_pipeline(arguments)
    if pipeline.languages and not arguments.language and not getattr(arguments, "language_column", None):
        arguments.language = pipeline.tokenizer.language
        source = open_source(arguments)  # of a table of several languages, the model's first alone
    started = time.perf_counter()
    found = measure(arguments, pipeline, source)
    seconds = time.perf_counter() - started
    for image in found.broken:
        complain_of_left_out(image.reason)
    found = found._replace(broken=[*found.broken, *_lost(source)])
    counts = {**found.counts, "broken_images": len(found.broken)}
    table = [
        (found.titles.get(name, name.replace("_", " ")), _shown(name, value)) for name, value in found.scores.items()
    ]
    table += [(name.replace("_", " "), f"{count:,}") for name, count in counts.items()]
    print(format_table([*table, *found.notes.items()]))
    if arguments.out:
        from opencoca.system.files import write_json

        write_json(arguments.out, _content(arguments, found, counts, seconds))
    if found.problem:
        raise CommandError(found.problem)
    return 0


def _lost(source: "SampleSource") -> "list[BrokenImage]":
    """The images that the shards of a source have lost; opening it has told of them."""
    from opencoca.evaluation.encoding import BrokenImage

    return [BrokenImage(sample.key, sample.reason) for sample in source.lost if sample.key]


def _shown(name: str, value: float) -> str:
    return f"{value:g}" if name.endswith("rank") else f"{100 * value:.2f}"


def _content(arguments: argparse.Namespace, found: _Found, counts: Mapping[str, int], seconds: float) -> dict[str, Any]:
    import opencoca
    from opencoca.inference.loading import DEFAULT_MODEL

    places = ("images", "captions", "labels", "class_names")
    settings = ("batch_size", "limit", "device", "dtype", "templates", "by", "rerank_top", "language")
    given = vars(arguments)
    return {
        "task": arguments.evaluate_command,
        "metrics": dict(found.scores),
        "model": arguments.model or DEFAULT_MODEL,
        "data": {name: given[name] for name in places if name in given},
        "counts": counts,
        "broken_images": [asdict(image) for image in found.broken],
        **found.written,
        **found.notes,
        "seconds": round(seconds, 3),
        "opencoca_version": opencoca.__version__,
        "settings": {**{name: given[name] for name in settings if name in given}, **found.settings},
    }


def _retrieval(arguments: argparse.Namespace, pipeline: "Pipeline", source: "SampleSource") -> _Found:
    from opencoca.evaluation.retrieval import evaluate_retrieval

    by, top, size = arguments.by, arguments.rerank_top, arguments.batch_size
    report = evaluate_retrieval(pipeline, source, by=by, rerank_top=top, batch_size=size, progress=True)
    scores = asdict(report.scores)
    counts = {"images": scores.pop("num_images"), "captions": scores.pop("num_texts")}
    return _Found(
        scores, counts | {"images_without_captions": report.num_images_without_captions}, report.broken_images
    )


def _captioning(arguments: argparse.Namespace, pipeline: "Pipeline", source: "SampleSource") -> _Found:
    from opencoca.evaluation.caption_words import token_kind
    from opencoca.evaluation.captioning import evaluate_captioning
    from opencoca.generation.rerank import rerank_weight

    options, rerank, language = chosen_generation_options(arguments), arguments.rerank, pipeline.tokenizer.language
    if arguments.coco and language not in (None, "en"):
        raise CommandError(f"METEOR and SPICE are computed for English alone, not for {language}; leave --coco out")
    report = evaluate_captioning(
        pipeline, source, options, rerank=rerank, batch_size=arguments.batch_size, progress=True
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
    settings = {**asdict(options), "rerank": rerank_weight(rerank)}
    notes = {} if language is None else {"language": language, "tokens": token_kind(language)}
    return _Found(scores, counts, report.broken_images, settings=settings, problem=problem, notes=notes)


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


def _zero_shot(arguments: argparse.Namespace, pipeline: "Pipeline", source: "SampleSource") -> _Found:
    from opencoca.evaluation.classification import named_confusions
    from opencoca.evaluation.prompts import load_templates
    from opencoca.evaluation.zero_shot import evaluate_zero_shot, read_class_names

    names = read_class_names(arguments.class_names) if arguments.class_names else None
    templates = load_templates(arguments.templates)
    by, size = arguments.by, arguments.batch_size
    report = evaluate_zero_shot(pipeline, source, templates, names, by=by, batch_size=size, progress=True)
    scores = {name: getattr(report.scores, name) for name in ("top1", "top5", "mean_per_class")}
    counts = {"images": report.scores.num_images, "labels": len(report.labels), "templates": len(templates)}
    confusions = named_confusions(report.scores, report.labels)
    return _Found(scores, counts, report.broken_images, {"confusions": confusions})


def _finetuned(arguments: argparse.Namespace, pipeline: "Pipeline", source: "SampleSource") -> _Found:
    """Scores a model by the task that it was finetuned on."""
    from opencoca.evaluation.encoding import encode_images
    from opencoca.evaluation.runner import Scores, evaluate
    from opencoca.tasks import stored_task

    task, wanted = stored_task(pipeline.task), arguments.evaluate_command
    if task.name != wanted:
        raise CommandError(f"this model was finetuned on {task.name}; use `opencoca evaluate {task.name}`")
    batches = encode_images(pipeline, source, arguments.batch_size, progress=True, description="encoding images")
    parts, broken = evaluate(batches, *task.evaluators(source, pipeline.tokenizer))
    found = Scores.joined(parts)
    titles = {score.name: score.label for score in task.scores}
    return _Found(found.values, found.counts, broken, found.written, titles=titles)


def _write_captions(path: str, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    from opencoca.system.files import atomic_write

    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for image, caption in captions.items():
            row = {"image": image, "caption": caption, "references": references[image]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
